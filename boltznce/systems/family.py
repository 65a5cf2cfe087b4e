"""Many peptides with one force field: what a model of many molecules is trained on, and what it must never see."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from boltznce.errors import UserError
from boltznce.states import State
from boltznce.systems.base import ROLES, System, check_name
from boltznce.systems.molecular import MolecularSystem
from boltznce.systems.peptides import parse_sequence

__all__ = ["PeptideFamily"]


class PeptideFamily:
    """Peptides named by their sequences, all in one force field, at one temperature and with one atom encoding.

    Args:
        name: what to call it.
        selection: which of ``selections`` is meant.
        selections: name -> role (``train``, ``validation``, ``test``) -> sequences. No sequence has two roles.
        never_trained: sequences that may be nothing but test peptides, in every selection.
        simulation: how its peptides are simulated where nothing else is said (see `boltznce.data.simulate.plan`, and
            ``method``).
        encoding, n_places: see `encodings.encode_atoms`; the model's input for every member.
        settings: those of `MolecularSystem` that all members share.

    Raises UserError for selections and sequences that do not exist, for peptides that stand in two lists, and for
    D-residues.
    """

    dim = 3
    translation_invariant = True
    is_family = True

    def __init__(
        self,
        name: str,
        selection: str,
        selections: Mapping[str, Mapping[str, Sequence[str]]],
        never_trained: Sequence[str] = (),
        encoding: str = "full",
        n_places: int = 2,
        simulation: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        check_name(name)
        if selection not in selections:
            raise UserError(f"{name} has no selection {selection!r}: choose one of {', '.join(selections)}.")
        chosen = selections[selection]
        if unknown := sorted(set(chosen) - set(ROLES)):
            raise UserError(f"Unknown list of peptides {', '.join(unknown)} in {name}: choose of {', '.join(ROLES)}.")
        if unknown := sorted(set(settings) - set(inspect.signature(MolecularSystem).parameters)):
            raise UserError(f"{name} has no setting {', '.join(unknown)}: its peptides have those of MolecularSystem.")
        self.name, self.selection = name, selection
        self.sequences = {role: tuple(str(sequence) for sequence in chosen.get(role, ())) for role in ROLES}
        self.encoding, self.n_places, self.settings = encoding, n_places, settings
        self.simulation = dict(simulation or {})
        self._members: dict[str, MolecularSystem] = {}
        if not self.sequences["train"]:
            raise UserError(f"{name} has no peptides to train on: set system.selections.{selection}.train.")
        roles: dict[str, str] = {}
        for role, sequences in self.sequences.items():
            for sequence in sequences:
                _check_sequence(sequence)
                if sequence in roles:
                    raise UserError(f"{sequence} is both a {roles[sequence]} and a {role} peptide: leave one out.")
                if sequence in never_trained and role != "test":
                    raise UserError(f"{sequence} is kept for tests and cannot be a {role} peptide.")
                roles[sequence] = role

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(found)} {role}" for role, found in self.sequences.items() if found)
        force_field = " + ".join(self.settings["forcefield"])
        return f"PeptideFamily({self.name}, {self.selection}: {counts} peptides, {self.temperature:g} K, {force_field})"

    @property
    def identity(self) -> dict[str, Any]:
        """That of the first to train on, under the family's name: the peptides that it has stand in the config."""
        return self.example.identity | {"name": self.name}

    def member(self, sequence: str) -> MolecularSystem:
        """A peptide of the family, listed or not: made once."""
        if sequence not in self._members:
            self._members[sequence] = MolecularSystem(**self.settings_of(sequence))
        return self._members[sequence]

    def settings_of(self, sequence: str) -> dict[str, Any]:
        """Those of a peptide as a `MolecularSystem` of its own."""
        _check_sequence(sequence)
        encoding = {"encoding": self.encoding, "n_places": self.n_places}
        return {"name": sequence, "structure": sequence, **encoding, **self.settings}

    @property
    def example(self) -> MolecularSystem:
        """The first to train on, to be asked what is the same for all: to make a member takes half a second."""
        return self.member(self.sequences["train"][0])

    def members(self, role: str) -> list[MolecularSystem]:
        """The peptides of a role, in the order of their list."""
        return [self.member(sequence) for sequence in self.sequences[role]]

    def all_members(self) -> list[MolecularSystem]:
        """Every listed peptide, those to be trained on first."""
        return [member for role in ROLES for member in self.members(role)]

    def label(self, member: System) -> str:
        """A member's sequence: what tells its folder and random streams from another's."""
        return member.name

    @property
    def labels(self) -> Sequence[str]:
        """Those of all members, which need not be made for it."""
        return [sequence for role in ROLES for sequence in self.sequences[role]]

    def choose(self, system: MolecularSystem | str | None = None) -> MolecularSystem:
        """A peptide, listed or not, by its sequence or as `load_system` makes it.

        Raises UserError for None, and for a system of another force field or temperature than the family's.
        """
        if system is None:
            example = [*self.sequences["train"], *self.sequences["test"]][-1]
            raise UserError(f"This run is of many molecules: say which one is meant, for example system={example}.")
        if isinstance(system, str):
            return self.member(system)
        member = self.member(system.name)
        if not member.equals(system):
            raise UserError(f"{system.name} has another force field or temperature than this run: give its sequence.")
        return member

    def strangeness(self, sequence: str) -> list[str]:
        """Sentences on what a peptide has and none that is trained on: residues, as many of them, its ends.

        >>> from boltznce.config import load_system
        >>> load_system("dipeptides").strangeness("AK")
        ['No peptide that the model was trained on has the residue K.']
        """
        known, (residues, capped) = list(map(parse_sequence, self.sequences["train"])), parse_sequence(sequence)
        seen = {residue for each, _ in known for residue in each}
        new = [residue for residue in dict.fromkeys(residues) if residue not in seen]
        told = [f"No peptide that the model was trained on has the residue {residue}." for residue in new]
        if len(residues) not in {len(each) for each, _ in known}:
            told.append(f"No peptide that the model was trained on has {len(residues)} residues.")
        if capped not in {ends for _, ends in known}:
            told.append(f"No peptide that the model was trained on has such ends as {sequence}.")
        return told

    @property
    def temperature(self) -> float:
        return float(self.settings["temperature"])

    @cached_property
    def state(self) -> State | None:
        """That of every member."""
        return self.example.state

    @cached_property
    def n_features(self) -> int:
        """Width of the atom features, the same for all members."""
        return self.example.features.shape[1]


def _check_sequence(sequence: str) -> None:
    residues, _ = parse_sequence(sequence)
    if mirrored := [residue for residue in residues if residue[0] == "d"]:
        raise UserError(
            f"{sequence} has a D-residue ({mirrored[0]}), which the atom encodings of a family do not tell from an "
            f"L-residue: leave it out, or train on it alone, system={sequence}."
        )
