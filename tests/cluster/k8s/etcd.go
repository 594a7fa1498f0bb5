package main

import (
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// newEtcdCommand is a single etcd member. It has the few flags that a throw-away cluster needs,
// under the names that etcd itself gives them.
func newEtcdCommand() *cobra.Command {
	config := embed.NewConfig()
	var clientURL, peerURL string
	command := &cobra.Command{
		Use:          "etcd",
		Short:        "a single etcd member for a local cluster",
		SilenceUsage: true,
		RunE: func(*cobra.Command, []string) error {
			client, err := url.Parse(clientURL)
			if err != nil {
				return fmt.Errorf("--listen-client-urls %q: %w", clientURL, err)
			}
			peer, err := url.Parse(peerURL)
			if err != nil {
				return fmt.Errorf("--listen-peer-urls %q: %w", peerURL, err)
			}
			config.ListenClientUrls = []url.URL{*client}
			config.AdvertiseClientUrls = []url.URL{*client}
			config.ListenPeerUrls = []url.URL{*peer}
			config.AdvertisePeerUrls = []url.URL{*peer}
			config.InitialCluster = config.InitialClusterFromName(config.Name)
			return runEtcd(config)
		},
	}
	flags := command.Flags()
	flags.StringVar(&config.Dir, "data-dir", "", "where the data lives")
	flags.StringVar(&clientURL, "listen-client-urls", "http://127.0.0.1:2379", "the one URL for clients")
	flags.StringVar(&peerURL, "listen-peer-urls", "http://127.0.0.1:2380", "the one URL for peers")
	flags.BoolVar(&config.UnsafeNoFsync, "unsafe-no-fsync", false, "never wait for the disk")
	flags.StringVar(&config.LogLevel, "log-level", "warn", "debug, info, warn or error")
	return command
}

func runEtcd(config *embed.Config) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	server, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	defer server.Close()
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(time.Minute):
		server.Server.Stop()
		return fmt.Errorf("etcd in %s was not ready after 60 s", config.Dir)
	case err = <-server.Err():
		return err
	}
	select {
	case <-stop:
		return nil
	case err = <-server.Err():
		return err
	}
}
