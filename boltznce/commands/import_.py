"""A dataset of trajectories made elsewhere. `boltznce import system=AK topology=AK.pdb files=AK.xtc temperature=310`"""

from omegaconf import DictConfig

from boltznce.config import build
from boltznce.data.trajectory import import_trajectory
from boltznce.folders import inside
from boltznce.records import as_dict

SETTINGS = ("temperature", "stride", "weights", "bias", "energies", "key", "length_unit")


def main(config: DictConfig) -> None:
    system, folder = build(config.system), inside(config.data_dir, config.name, "name")
    files = as_dict(config)["files"]
    settings = {name: config[name] for name in SETTINGS}
    dataset = import_trajectory(folder, config.topology, files, system, **settings)
    print(f"{len(dataset)} frames of {system.name} in {folder}: data.folder={folder} trains on them")
