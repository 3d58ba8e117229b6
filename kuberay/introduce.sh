#!/bin/sh
# A private swarm has no public node to ask: each node is told of the others, by their names in the cluster, again and
# again, since a pod that was made anew has another address. LLMD_NODES: how many pods there are.
while true; do
  i=0
  while [ "$i" -lt "$LLMD_NODES" ]; do
    host="kubo-$i.kubo-nodes"
    id=$(ipfs --api="/dns4/$host/tcp/5001" --timeout=5s id -f '<id>') &&
      ipfs --api=/ip4/127.0.0.1/tcp/5001 --timeout=10s swarm connect "/dns4/$host/tcp/4001/p2p/$id"
    i=$((i + 1))
  done
  sleep 30
done
