"""Reference data by simulation. `boltznce simulate system=aldp`; reference=true: also a reference ΔF."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from boltznce.command_line import command_line
from boltznce.config import build
from boltznce.data.members import simulate_members
from boltznce.data.packed import pack
from boltznce.data.reference import (
    REFERENCE_FOLDER,
    check_reference_place,
    make_reference,
    require_reference,
    result_of,
    save_reference,
)
from boltznce.errors import UserError
from boltznce.folders import inside
from boltznce.methods.proxy import FromProxy, refine_frames
from boltznce.records import as_dict


def main(config: DictConfig) -> None:
    system, folder = build(config.system), inside(config.data_dir, config.name, "name")
    if config.reference:
        require_reference(system.choose(), config.sampling, config.settings.get("dihedral"))  # of a family: which?
        output = Path(config.output) if config.output else REFERENCE_FOLDER / f"{system.name}.json"
        check_reference_place(output, system.name)
    settings = {key: config[key] for key in ("duration", "n_repeats", "n_processes", "engine", "seed")}
    datasets = simulate_members(system, folder, config.sampling, **settings, **as_dict(config.settings))
    for member in system.all_members():
        dataset = datasets[member.name]
        print(f"{len(dataset)} frames of {member.name} in {folder / system.label(member)}")
        biased = dataset.meta["settings"]["method"] == "metadynamics" and member.state is not None and member.state.name
        if not (biased or config.reference):
            continue
        result = result_of(dataset, member.cheap)
        print(result.summary())
        if config.reference and member.proxy is not None:
            if result.message:
                raise UserError(f"The proxy is not known well enough: {result.message}. Simulate longer (duration).")
            place = folder.with_name(f"{folder.name}-refined") / system.label(member)
            dataset = refine_frames(member, dataset, FromProxy(**config.from_proxy), seed=config.seed, folder=place)
            result = result_of(dataset, member)
            print(f"{len(dataset)} frames of its proxy, annealed to {member.name}, in {place}\n{result.summary()}")
        if config.reference:
            command = command_line("simulate", *sys.argv[1:])
            save_reference(make_reference(member, dataset.meta, result, command), output)
            print(f"reference in {output}")
    if config.packed.file is not None:
        roles = {member.name: member for role in ("train", "validation") for member in system.members(role)}
        pairs = [(member.cheap, datasets[name]) for name, member in roles.items()]
        pack(Path(config.packed.file), pairs, config.packed.n_frames, config.seed)
        print(f"{len(pairs)} molecules in {config.packed.file}")
