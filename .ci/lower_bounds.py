"""Print setup.cfg's lower bounds as a pip constraints file: `numpy>=2.0` becomes `numpy==2.0`."""

import configparser
import re
from pathlib import Path


config = configparser.ConfigParser()
config.read(Path(__file__).parents[1] / "setup.cfg")
groups = [config["options"]["install_requires"], *config["options.extras_require"].values()]
bounds = {}
for line in filter(None, "\n".join(groups).splitlines()):
    if bound := re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)(?:,.*)?", line):
        name, version = bound.groups()
        if bounds.setdefault(name, version) != version:
            raise SystemExit(f"setup.cfg gives two lower bounds for {name}: {bounds[name]} and {version}.")
    elif not re.match(r"clipcap-hf\[|[\w.-]+==", line):
        raise SystemExit(f"setup.cfg gives no lower bound that can be read: {line}")
print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
