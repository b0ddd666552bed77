// A Kubernetes API server in one process: etcd, kube-apiserver, the controller that makes EndpointSlices, and with
// -metrics-port the one of HorizontalPodAutoscalers, which asks for external metrics there.
//
// It has no node: pods are made and said to be ready by who tests. All it keeps is under -data, so that a second run on
// the same folder and ports is the same cluster after a restart. It listens on loopback only.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"log"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/scale"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/pkg/controller/endpointslice"
	"k8s.io/kubernetes/pkg/controller/podautoscaler"
	"k8s.io/kubernetes/pkg/controller/podautoscaler/metrics"
	"k8s.io/metrics/pkg/client/external_metrics"
)

const adminToken = "admin-of-the-tests"

func main() {
	data := flag.String("data", "", "the folder that keeps the cluster")
	port := flag.Int("port", 0, "where the API is served")
	etcdPort := flag.Int("etcd-port", 0, "where etcd is")
	metricsPort := flag.Int("metrics-port", 0, "where external metrics are served; 0: nothing is autoscaled")
	flag.Parse()
	if *data == "" || *port == 0 || *etcdPort == 0 {
		log.Fatal("-data, -port and -etcd-port are needed")
	}
	store := startEtcd(filepath.Join(*data, "etcd"), *etcdPort)
	defer store.Close()
	go runControllers(*port, *metricsPort)
	command := app.NewAPIServerCommand()
	command.SetArgs(arguments(*data, *port, *etcdPort))
	if err := command.ExecuteContext(context.Background()); err != nil {
		log.Fatal(err)
	}
}

// startEtcd returns an etcd that answers clients. Its HTTP gateway is on: a test compacts by it.
func startEtcd(folder string, port int) *embed.Etcd {
	config := embed.NewConfig()
	config.Dir = folder
	config.LogLevel = "error"
	config.UnsafeNoFsync = true // a test's data may be lost with the machine
	clients := []url.URL{{Scheme: "http", Host: fmt.Sprintf("127.0.0.1:%d", port)}}
	peers := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}} // nobody comes there
	config.ListenClientUrls, config.AdvertiseClientUrls = clients, clients
	config.ListenPeerUrls, config.AdvertisePeerUrls = peers, peers
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	store, err := embed.StartEtcd(config)
	if err != nil {
		log.Fatal(err)
	}
	<-store.Server.ReadyNotify()
	return store
}

func arguments(data string, port, etcdPort int) []string {
	key := filepath.Join(data, "accounts.key")
	if _, err := os.Stat(key); err != nil {
		writeKey(key)
	}
	tokens := filepath.Join(data, "tokens.csv")
	write(tokens, fmt.Sprintf("%s,admin,admin,system:masters\n", adminToken))
	return []string{
		fmt.Sprintf("--etcd-servers=http://127.0.0.1:%d", etcdPort),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port),
		"--cert-dir=" + data,
		"--service-cluster-ip-range=10.96.0.0/16",
		"--endpoint-reconciler-type=none",
		"--authorization-mode=RBAC",
		"--feature-gates=ListFromCacheSnapshot=false", // a page's successor can be too old, as with servers before 1.34
		"--token-auth-file=" + tokens,
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + key, "--service-account-signing-key-file=" + key,
		"--v=0",
	}
}

func writeKey(path string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	bytes, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		log.Fatal(err)
	}
	write(path, string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: bytes})))
}

func write(path, text string) {
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		log.Fatal(err)
	}
}

// runControllers runs what follows objects of the API, once that is there.
func runControllers(port, metricsPort int) {
	config := &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", port),
		BearerToken:     adminToken,
		TLSClientConfig: rest.TLSClientConfig{Insecure: true},
		QPS:             200, Burst: 400,
	}
	client := kubernetes.NewForConfigOrDie(config)
	for client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(context.Background()).Error() != nil {
		time.Sleep(50 * time.Millisecond)
	}
	if metricsPort != 0 {
		go followScalers(config, client, metricsPort)
	}
	followSlices(client)
}

// followSlices runs the controller that makes the EndpointSlices of services.
func followSlices(client kubernetes.Interface) {
	shared := informers.NewSharedInformerFactory(client, 0)
	core := shared.Core().V1()
	controller := endpointslice.NewController(context.Background(), core.Pods(), core.Services(), core.Nodes(),
		shared.Discovery().V1().EndpointSlices(), 100, client, 50*time.Millisecond)
	shared.Start(context.Background().Done())
	controller.Run(context.Background(), 1)
}

// followScalers runs the controller of HorizontalPodAutoscalers, as kube-controller-manager does, but each second. It
// asks whoever serves external metrics by himself: a real cluster's API server would stand between.
func followScalers(config *rest.Config, client kubernetes.Interface, metricsPort int) {
	asked := rest.CopyConfig(config)
	asked.Host = fmt.Sprintf("https://127.0.0.1:%d", metricsPort)
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery()))
	scales, err := scale.NewForConfig(config, mapper, dynamic.LegacyAPIPathResolverFunc,
		scale.NewDiscoveryScaleKindResolver(client.Discovery()))
	if err != nil {
		log.Fatal(err)
	}
	external := metrics.NewRESTMetricsClient(nil, nil, external_metrics.NewForConfigOrDie(asked))
	shared := informers.NewSharedInformerFactory(client, 0)
	controller := podautoscaler.NewHorizontalController(context.Background(), client.CoreV1(), scales,
		client.AutoscalingV2(), mapper, external, shared.Autoscaling().V2().HorizontalPodAutoscalers(),
		shared.Core().V1().Pods(), time.Second, time.Second, 0.1, 0, 0)
	shared.Start(context.Background().Done())
	controller.Run(context.Background(), 1)
}
