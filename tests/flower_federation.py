"""A server and sites in Flower's own processes on loopback, with TLS and registered keys, below one folder."""

import json
import time

from nnunet_dp.federated.flower_keys import make_certificates, make_key_pair


class Federation:
    """A server and sites, all with keys, below one folder."""

    def __init__(self, folder, flower):
        self.folder, self.flower = folder, flower
        self.certificates = make_certificates(folder / "tls")
        self.server = flower.start_superlink(certificates=self.certificates, authenticate=True)

    @property
    def port(self):
        return int(self.server.address.rpartition(":")[2])

    def start(self, name, registered=True):
        key = self.folder / f"{name}.key"
        if not key.exists():
            public = make_key_pair(key)
            (self.folder / f"{name}.toml").touch()
            if registered:
                self.flower.register(self.server, public)
        return self.flower.start_supernode(name, self.folder / f"{name}.toml", self.server, key)

    def submit(self, *steps):
        return self.submit_config(json.dumps({"steps": [{"kind": "train", **step} for step in steps]}), "run")

    def submit_config(self, config, run):
        (self.folder / f"{run}.json").write_text(config)
        return self.flower.submit(self.server, self.folder / f"{run}.json", self.folder / run)

    def wait(self, run, timeout_s=250):
        return self.flower.wait(run, timeout_s=timeout_s)

    def rounds(self):
        file = self.folder / "run" / "rounds.json"
        return json.loads(file.read_text()) if file.is_file() else []

    def calls(self, name):
        file = self.folder / f"{name}.calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def until(self, condition, seconds=100):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            self.flower.poll()
            time.sleep(0.1)
