// Command coredns is CoreDNS with the few plugins that a local cluster needs, so that it builds in
// two minutes and not in ten.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
	_ "github.com/coredns/coredns/plugin/template"
)

// The order is upstream's plugin.cfg. template comes before kubernetes: the Corefile must keep the
// two in separate server blocks, or template answers everything.
func init() {
	dnsserver.Directives = []string{
		"reload", "ready", "health", "errors", "log", "cache", "loadbalance", "template", "kubernetes",
	}
}

func main() {
	coremain.Run()
}
