// Command forward carries connections from a socket that it was given into the network namespace
// that it was started in. The socket was opened on the host's loopback, so the host reaches the
// apiserver of a cluster with no link, address or route of its own, and nothing leaves the machine
// when the cluster is gone and someone still calls it.
//
//	forward LISTENER-FD ADDRESS
package main

import (
	"io"
	"log"
	"net"
	"os"
	"strconv"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: forward LISTENER-FD ADDRESS")
	}
	fd, err := strconv.ParseUint(os.Args[1], 10, 16)
	if err != nil {
		log.Fatalf("forward: the listener must be a file descriptor: %v", err)
	}
	listener, err := net.FileListener(os.NewFile(uintptr(fd), "listener"))
	if err != nil {
		log.Fatalf("forward: descriptor %d is not a listening socket: %v", fd, err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatalf("forward: accept: %v", err)
		}
		go carry(connection.(*net.TCPConn), os.Args[2])
	}
}

// carry copies both ways and closes each half when its source ends, as a watch that the server
// ends must end at the client too.
func carry(client *net.TCPConn, address string) {
	defer client.Close()
	dialled, err := net.Dial("tcp", address)
	if err != nil {
		log.Printf("forward: %v", err)
		return
	}
	server := dialled.(*net.TCPConn)
	defer server.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(server, client)
		server.CloseWrite()
	}()
	io.Copy(client, server)
	client.CloseWrite()
	<-done
}
