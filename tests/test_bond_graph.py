"""The bond graph of conformers: thermal ones are right, broken ones are told, exchanged atoms are put back."""

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from boltznce import UserError, load_system
from boltznce.systems import bond_graph
from boltznce.systems.bond_graph import BondGraph, refine_colours
from boltznce.systems.symmetry import mend_chirality


@pytest.fixture(scope="module", params=["KS", "MC", "DR"])
def molecule(request):
    system = load_system(request.param)
    noise = torch.randn(32, system.n_atoms, 3, generator=torch.Generator().manual_seed(0))
    return system, BondGraph.of(system.topology), system.positions + 0.004 * noise  # nm; thermal bonds spread by 0.003


def atom(system, name, residue=0):
    return next(a.index for a in system.topology.atoms if a.name == name and a.residue.index == residue)


def exchange(x, i, j):
    x = x.clone()
    x[:, [i, j]] = x[:, [j, i]]
    return x


def test_conformers_with_noise_are_right(molecule):
    _, graph, x = molecule
    check = graph.check(x, batch_size=10)
    assert check.right.all()
    assert not check.reordered.any()
    torch.testing.assert_close(check.apply(x), x)


def test_frames_of_md_are_right():
    system = load_system("GT")
    integrator = openmm.LangevinMiddleIntegrator(310, 5.0, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(system.openmm_system(), integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(system.positions.double().numpy())
    context.setVelocitiesToTemperature(310, 1)
    frames = []
    for _ in range(20):
        integrator.step(40)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    assert BondGraph.of(system.topology).check(torch.tensor(np.array(frames))).right.all()


def test_equivalent_atoms_are_put_back(molecule):
    """Hydrogens on one atom, the oxygens of a carboxylate, and atoms of one element anywhere."""
    system, graph, x = molecule
    pairs = [("HA", "HB2", 0), ("N", "N", None), ("H1", "HA", 0), ("CA", "CB", 0), ("H1", "H2", 0), ("O", "OXT", 1)]
    for first, second, residue in pairs:
        if residue is None:
            i, j = atom(system, first, 0), atom(system, second, 1)
        else:
            i, j = atom(system, first, residue), atom(system, second, residue)
        check = graph.check(exchange(x, i, j))
        assert check.right.all()
        # two on the same atom are bonded alike in either order, so that there is nothing to put back
        assert check.reordered.all() == ((first, second) not in (("H1", "H2"), ("O", "OXT")))
        mended = check.apply(exchange(x, i, j))
        assert (graph.contacts(mended) == graph.adjacency).all()
    energy = system.energy(check.apply(x))
    torch.testing.assert_close(energy, system.energy(x))


def test_any_order_within_the_elements_is_put_back(molecule):
    """What remains is an automorphism: every bond goes over into a bond, every element into itself."""
    system, graph, x = molecule
    generator = torch.Generator().manual_seed(1)
    order = torch.arange(system.n_atoms)
    symbols = [a.element.symbol for a in system.topology.atoms]
    for symbol in set(symbols):
        places = torch.tensor([i for i, s in enumerate(symbols) if s == symbol])
        order[places] = places[torch.randperm(len(places), generator=generator)]
    check = graph.check(x[:4, order])
    assert check.reordered.all()
    for i, found in enumerate(check.order):
        remaining = order[found]
        torch.testing.assert_close(check.apply(x[:4, order])[i], x[i, remaining])
        assert (graph.adjacency[remaining][:, remaining] == graph.adjacency).all()
        assert [symbols[k] for k in remaining.tolist()] == symbols
        assert len(set(remaining.tolist())) == system.n_atoms


def test_wrong_ones_are_told(molecule):
    system, graph, x = molecule
    away = torch.tensor([0.2, 0.1, 0.1])
    hydrogen, alpha, nitrogen, oxygen = (atom(system, name) for name in ("HA", "CA", "N", "O"))

    broken = x.clone()
    broken[:, hydrogen] += 3 * away
    fused = x.clone()
    fused[:, oxygen] = x[:, hydrogen] + 0.3 * away / away.norm() * 0.1
    collapsed = x.clone()
    collapsed[:, hydrogen] = x[:, alpha]
    elements = exchange(x, alpha, nitrogen)
    for wrong in (broken, fused, collapsed, elements, torch.full_like(x, torch.nan)):
        check = graph.check(wrong)
        assert not check.right.any()
        torch.testing.assert_close(check.apply(wrong), wrong, equal_nan=True)

    # one hydrogen moved from one carbon to another: the same number of bonds, of the same elements
    moved = x.clone()
    moved[:, hydrogen] = x[:, atom(system, "CB")] + (x[:, alpha] - x[:, atom(system, "N")]) / 0.147 * 0.09
    assert not graph.check(moved).right.any()

    mixed = graph.check(torch.cat([x[:2], broken[:1], exchange(x[2:3], hydrogen, atom(system, "HB2")), elements[:1]]))
    assert mixed.right.tolist() == [True, True, False, True, False]
    assert mixed.reordered.tolist() == [False, False, False, True, False]


def test_the_usual_case_needs_no_graph_matching(molecule, monkeypatch):
    monkeypatch.setattr(bond_graph.BondGraph, "_match", None)
    assert molecule[1].check(molecule[2]).right.all()


def test_colours_belong_to_surroundings_and_not_to_order():
    elements = torch.tensor([0, 1, 1, 0, 0]).numpy().astype("uint64")
    chain = torch.zeros(5, 5, dtype=torch.bool)
    for a, b in ((0, 1), (1, 2), (2, 3), (2, 4)):
        chain[a, b] = chain[b, a] = True
    order = torch.tensor([3, 2, 1, 0, 4])
    colours = refine_colours(chain[None].numpy(), elements)[0]
    other = refine_colours(chain[order][:, order][None].numpy(), elements[order.numpy()])[0]
    assert (colours[order.numpy()] == other).all()
    assert colours[3] == colours[4]
    assert len(set(colours.tolist())) == 4


def test_mirrored_and_reordered_conformers_are_mended(molecule):
    system, graph, x = molecule
    i, j = atom(system, "HA"), atom(system, "HB2")
    check = graph.check(exchange(-x, i, j))
    y = check.apply(exchange(-x, i, j))
    mended = mend_chirality(y, system.chirality(y), mirror=True)
    assert mended.n_mirrored == len(x)
    assert (system.chirality(mended.positions) > 0).all()


BONDS_TO_CARBON = {"B": 0.156, "F": 0.138, "Si": 0.187, "P": 0.184, "Cl": 0.179, "Se": 0.195, "Br": 0.194, "I": 0.214}


@pytest.mark.parametrize(("symbol", "length"), BONDS_TO_CARBON.items())
def test_bonds_of_carbon_to_other_elements(symbol, length):
    """Tetrahedral carbon with three such atoms (of iodine one), nm: bonded to it and not to each other."""
    symbols = ["H", "H", "H", symbol] if symbol == "I" else ["H", symbol, symbol, symbol]
    lengths = torch.tensor([0.109 if each == "H" else length for each in symbols]).unsqueeze(1)
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
    x = torch.cat([torch.zeros(1, 3), lengths * corners])
    graph = BondGraph(["C", *symbols], [(0, k) for k in range(1, 5)])
    noise = 0.003 * torch.randn(20, 5, 3, generator=torch.Generator().manual_seed(0))
    assert graph.check(x + noise).right.all()


def test_unknown_element_is_told():
    with pytest.raises(UserError, match="radius for Fe"):
        BondGraph(["C", "Fe"], [(0, 1)])
