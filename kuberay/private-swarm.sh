#!/bin/sh
# A private swarm. Written by shard_tools.ipfs_daemon.container_script, which says why; tests/kuberay holds them equal.
set -e
install -m 0600 /run/secrets/swarm.key "$IPFS_PATH/swarm.key"
ipfs config --json Bootstrap '[]'
ipfs config --json Addresses.Swarm '["/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001"]'
ipfs config --json Addresses.API '"/ip4/0.0.0.0/tcp/5001"'
ipfs config --json Addresses.Gateway '"/ip4/0.0.0.0/tcp/8080"'
ipfs config --json Discovery.MDNS.Enabled 'false'
ipfs config --json AutoConf.Enabled 'false'
ipfs config --json AutoTLS.Enabled 'false'
ipfs config --json Routing.Type '"dht"'
ipfs config --json Routing.DelegatedRouters '[]'
ipfs config --json DNS.Resolvers '{}'
ipfs config --json Ipns.DelegatedPublishers '[]'
ipfs config --json Peering.Peers '[]'
ipfs config --json Swarm.DisableNatPortMap 'true'
ipfs config --json Swarm.RelayClient.Enabled 'false'
ipfs config --json Swarm.RelayService.Enabled 'false'
ipfs config --json Swarm.Transports.Network '{"QUIC": false, "WebTransport": false, "WebRTCDirect": false, "Websocket": false, "Relay": false}'
