"""The torch energy against OpenMM's Reference platform, and its behaviour where OpenMM's is no guide."""

import functools
import math

import openmm
import pytest
import torch
from openmm import app, unit
from openmm.app.internal.customgbforces import GBSAGBn2Force, GBSAGBnForce, GBSAHCTForce, GBSAOBC1Force, GBSAOBC2Force
from openmm_reference import absolute_terms, alone, distorted, energy_and_force, reference, relative, wild

from boltznce import UserError, load_system
from boltznce.systems.forcefield import TorchForceField
from boltznce.systems.molecular import MolecularSystem
from boltznce.systems.structures import STRUCTURES
from boltznce.systems.terms.solvation import CustomGB

N_ATOMS = 22
ALDP = app.PDBFile(str(STRUCTURES / "aldp.pdb"))
# Short cutoffs cut through the molecule.
CUT = {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 0.5 * unit.nanometer}
FIELDS = {
    "amber99+obc": (["amber99sbildn.xml", "amber99_obc.xml"], {}),
    "amber96+obc": (["amber96.xml", "amber96_obc.xml"], {}),
    "amber99+obc, cutoff": (["amber99sbildn.xml", "amber99_obc.xml"], CUT),
    "amber14+obc1": (["amber14-all.xml", "implicit/obc1.xml"], {}),
    "amber14+obc1, 2 nm": (["amber14-all.xml", "implicit/obc1.xml"], CUT | {"nonbondedCutoff": 2.0 * unit.nanometer}),
    "amber14+obc1, cutoff": (["amber14-all.xml", "implicit/obc1.xml"], CUT),
    "amber14+obc2, cutoff": (["amber14-all.xml", "implicit/obc2.xml"], CUT),
    "amber14+obc2, salt": (["amber14-all.xml", "implicit/obc2.xml"], {"implicitSolventKappa": 1.2 / unit.nanometer}),
    "amber14+obc1, salt, cutoff": (
        ["amber14-all.xml", "implicit/obc1.xml"],
        CUT | {"implicitSolventKappa": 1.2 / unit.nanometer},
    ),
    "amber14+gbn": (["amber14-all.xml", "implicit/gbn.xml"], {}),
    "amber14+gbn2": (["amber14-all.xml", "implicit/gbn2.xml"], {}),
    "amber14+gbn2, cutoff": (["amber14-all.xml", "implicit/gbn2.xml"], CUT | {"nonbondedCutoff": 0.6 * unit.nanometer}),
    "amber14, dielectrics": (
        ["amber14-all.xml", "implicit/gbn2.xml"],
        {"soluteDielectric": 2.0, "solventDielectric": 40.0},
    ),
    "amber14, no surface": (["amber14-all.xml", "implicit/obc1.xml"], {"sasaMethod": None}),
    "amber14, reaction field": (["amber14-all.xml"], CUT),
    "amber14, switched": (["amber14-all.xml"], CUT | {"switchDistance": 0.35 * unit.nanometer}),
    "amber19 (CMAP)": (["amber19-all.xml"], {}),
}


@functools.cache
def forcefield(*files):
    return app.ForceField(*files)


def from_files(files, settings):
    return forcefield(*files).createSystem(ALDP.topology, constraints=None, **settings)


def torsions():
    """Ryckaert-Bellemans torsions and two random maps of unlike sizes, over overlapping torsions."""
    random = torch.Generator().manual_seed(3)
    chain = [1, 4, 6, 8, 14, 16, 18]
    rb, cmap = openmm.RBTorsionForce(), openmm.CMAPTorsionForce()
    for n in range(4):
        rb.addTorsion(*chain[n : n + 4], *(10 * torch.randn(6, generator=random)).tolist())
    rb.addTorsion(*chain[:4], *(10 * torch.randn(6, generator=random)).tolist())
    for size in (16, 24):
        cmap.addMap(size, (10 * torch.randn(size * size, generator=random)).tolist())
    for number, (a, b) in enumerate([(0, 1), (1, 2), (3, 0)]):
        cmap.addTorsion(number % 2, *chain[a : a + 4], *chain[b : b + 4])
    return with_forces(rb, cmap, *(harmonic(chain, expression) for expression in IMPROPERS))


IMPROPERS = (  # as OpenMM's readers write them of files of CHARMM and GROMACS
    f"k*min(dtheta, 2*pi-dtheta)^2; dtheta = abs(theta-theta0);pi = {math.pi!r}",
    "0.5*k*(thetap-theta0)^2; thetap = step(-(theta-theta0+pi))*2*pi+theta+step(theta-theta0-pi)*(-2*pi); "
    f"pi = {math.pi!r}",
)


def harmonic(chain, expression):
    force = openmm.CustomTorsionForce(expression)
    force.addPerTorsionParameter("theta0")
    force.addPerTorsionParameter("k")
    for n, angle in enumerate((0.0, math.pi, -2.0, 3.0)):
        force.addTorsion(*chain[n % 3 : n % 3 + 4], [angle, 10.0 + n])
    return force


def random_born(model):
    """A solvation model with random parameters, descreening factors of both signs among them."""
    random = torch.Generator().manual_seed(4)
    force = model(SA="ACE")
    for _ in range(N_ATOMS):
        charge, radius, scale, *curve = torch.rand(6, generator=random).tolist()
        force.addParticle(
            [charge - 0.5, 0.11 + 0.08 * radius, 2 * scale - 0.5, *curve][: 6 if model is GBSAGBn2Force else 3]
        )
    force.finalize()
    return with_forces(force)


def with_forces(*forces):
    system = openmm.System()
    for _ in range(N_ATOMS):
        system.addParticle(1.0)
    for force in forces:
        system.addForce(force)
    return system


SYSTEMS = {name: (from_files, arguments) for name, arguments in FIELDS.items()} | {
    "torsions and maps": (torsions, ()),
    "random obc1": (random_born, (GBSAOBC1Force,)),
    "random obc2": (random_born, (GBSAOBC2Force,)),
    "random gbn": (random_born, (GBSAGBnForce,)),
    "random gbn2": (random_born, (GBSAGBn2Force,)),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    build, arguments = SYSTEMS[request.param]
    return build(*arguments)


@pytest.fixture(scope="module")
def thermal():
    """8 conformers of hot dynamics, (8, 22, 3), float64."""
    integrator = openmm.LangevinMiddleIntegrator(500, 10, 0.001)
    integrator.setRandomNumberSeed(1)
    hot = from_files(["amber99sbildn.xml", "amber99_obc.xml"], {})
    context = openmm.Context(hot, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(ALDP.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    frames = []
    for _ in range(8):
        integrator.step(200)
        frames.append(torch.from_numpy(context.getState(positions=True).getPositions(asNumpy=True)._value))
    return torch.stack(frames)


@pytest.mark.parametrize(
    ("dtype", "energy_bar", "force_bar"), [(torch.float64, 1e-8, 1e-9), (torch.float32, 1e-2, 1e-3)]
)
def test_thermal_conformers_equal_openmm(system, thermal, dtype, energy_bar, force_bar):
    x = thermal.to(dtype)
    expected, forces = reference(system, x)
    energy, force = energy_and_force(TorchForceField(system), x)
    assert energy.dtype == force.dtype == dtype
    assert (energy - expected).abs().max() < energy_bar
    assert relative(force, forces) < force_bar


@pytest.mark.parametrize(
    ("dtype", "energy_bar", "force_bar"), [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-5, 1e-3)]
)
def test_distorted_conformers_equal_openmm(system, thermal, dtype, energy_bar, force_bar):
    x = wild(thermal).to(dtype)
    expected, forces = reference(system, x)
    energy, force = energy_and_force(TorchForceField(system), x)
    assert ((energy - expected).abs() <= energy_bar * absolute_terms(system, x)).all()
    assert relative(force, forces) < force_bar


def test_each_force_alone_equals_openmm(system, thermal):
    for kept in range(system.getNumForces()):
        part = alone(system, kept)
        torch.testing.assert_close(TorchForceField(part)(thermal), reference(part, thermal)[0], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlapping_and_distant_atoms_give_finite_energies_and_gradients(system, thermal, dtype):
    one = thermal[0].to(dtype)
    pair, near, far, all_at_once = one.clone(), one.clone(), 1e6 * one, torch.zeros_like(one)
    pair[20] = pair[0]
    near[20] = near[0] + 1e-4
    line = torch.arange(N_ATOMS, dtype=dtype)[:, None] * torch.tensor([0.1, 0.0, 0.0], dtype=dtype)
    energy, force = energy_and_force(TorchForceField(system), torch.stack((pair, near, all_at_once, line, far)))
    assert energy.isfinite().all()
    assert force.isfinite().all()
    if any(isinstance(f, openmm.NonbondedForce) for f in system.getForces()):
        assert (energy[:3] > 1e8).all()


@pytest.mark.parametrize(
    "name", ["amber99+obc", "amber14+obc1, cutoff", "amber14+gbn2", "amber14, switched", "amber19 (CMAP)"]
)
def test_derivatives_are_those_of_the_energy(name, thermal):
    build, arguments = SYSTEMS[name]
    field = TorchForceField(build(*arguments))
    x = distorted(thermal[:1], 0.03).requires_grad_()
    assert torch.autograd.gradcheck(field, x, eps=1e-7, rtol=1e-4, atol=1e-1)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def gradient(step):
        y = (x.detach() + step * direction).requires_grad_()
        return torch.autograd.grad(field(y).sum(), y, create_graph=True)[0]

    (slope,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad((slope * direction).sum(), x)
    torch.testing.assert_close(curvature, (gradient(1e-6) - gradient(-1e-6)) / 2e-6, rtol=1e-4, atol=1.0)


@pytest.mark.parametrize("name", ["amber99+obc", "amber14+gbn2, cutoff", "amber19 (CMAP)"])
def test_pieces_of_a_batch_give_what_the_whole_gives(name, thermal, monkeypatch):
    build, arguments = SYSTEMS[name]
    system = build(*arguments)
    whole, pieces = TorchForceField(system), TorchForceField(system)
    monkeypatch.setattr(pieces, "chunk_size", lambda device: 3)
    for result, expected in zip(energy_and_force(pieces, thermal), energy_and_force(whole, thermal), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(pieces(thermal), whole(thermal), rtol=1e-10, atol=1e-8)
    assert whole(thermal[:0]).shape == (0,)


@pytest.mark.parametrize("cutoff", [None, 0.9])
def test_larger_system_equals_openmm(thermal, cutoff):
    """Three molecules side by side: 66 atoms, distances on both sides of the cutoff, exceptions in each molecule."""
    three = app.Modeller(ALDP.topology, ALDP.positions)
    for _ in range(2):
        three.add(ALDP.topology, ALDP.positions)
    method = (
        {} if cutoff is None else {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": cutoff * unit.nanometer}
    )
    system = forcefield("amber14-all.xml", "implicit/obc1.xml").createSystem(three.topology, constraints=None, **method)
    apart = 1.2 * torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
    centred = thermal[:4] - thermal[:4].mean(1, keepdim=True)
    x = (centred[:, None] + apart[:, None]).flatten(1, 2)
    for dtype, energy_bar, force_bar in ((torch.float64, 1e-8, 1e-9), (torch.float32, 1e-2, 1e-3)):
        expected, forces = reference(system, x.to(dtype))
        energy, force = energy_and_force(TorchForceField(system), x.to(dtype))
        assert (energy - expected).abs().max() < energy_bar
        assert relative(force, forces) < force_bar


def test_switching_goes_to_zero_for_two_atoms_alone():
    system = openmm.System()
    force = openmm.NonbondedForce()
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle(0.0, 0.3, 1.0)
    force.setNonbondedMethod(force.CutoffNonPeriodic)
    force.setCutoffDistance(1.0)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.6)
    system.addForce(force)
    x = torch.zeros(3, 2, 3, dtype=torch.float64)
    x[:, 1, 0] = torch.tensor([0.5, 0.8, 0.999])
    energy = TorchForceField(system)(x)
    torch.testing.assert_close(energy, reference(system, x)[0], rtol=1e-10, atol=1e-12)
    assert energy[2].abs() < 1e-8


def test_molecular_system_with_cutoff_uses_the_torch_energy(thermal):
    files = ["amber14-all.xml", "implicit/obc1.xml"]
    system = MolecularSystem(
        "aldp",
        structure="aldp",
        forcefield=files,
        temperature=310.0,
        nonbonded_method="CutoffNonPeriodic",
        cutoff_nm=2.0,
    )
    expected, _ = reference(system.openmm_system(), thermal)
    kt = (unit.MOLAR_GAS_CONSTANT_R * 310.0 * unit.kelvin).value_in_unit(unit.kilojoule_per_mole)
    torch.testing.assert_close(system.energy(thermal), expected / kt, rtol=1e-9, atol=1e-6)
    assert system.energy(thermal.float()).dtype == torch.float32


def test_motion_remover_and_empty_forces_have_no_energy(thermal):
    system = with_forces(openmm.CMMotionRemover(), openmm.CMAPTorsionForce(), openmm.HarmonicBondForce())
    assert torch.equal(TorchForceField(system)(thermal), torch.zeros(len(thermal), dtype=thermal.dtype))


def external():
    return with_forces(openmm.CustomExternalForce("x"))


def constrained():
    system = with_forces()
    system.addConstraint(0, 1, 0.1)
    return system


def virtual():
    system = with_forces()
    system.setParticleMass(2, 0.0)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    return system


def periodic(force):
    force.setNonbondedMethod(force.CutoffPeriodic)
    return with_forces(force)


def periodic_bonds():
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.1, 1.0)
    force.setUsesPeriodicBoundaryConditions(True)
    return with_forces(force)


def with_offsets():
    force = openmm.NonbondedForce()
    for _ in range(N_ATOMS):
        force.addParticle(0.0, 0.3, 1.0)
    force.addGlobalParameter("scale", 1.0)
    force.addParticleParameterOffset("scale", 0, 1.0, 0.0, 0.0)
    return with_forces(force)


def changed_born(old, new):
    """OBC1 with another text in one of its expressions."""
    system = random_born(GBSAOBC1Force)
    force = system.getForce(0)
    for n in range(force.getNumComputedValues()):
        name, expression, kind = force.getComputedValueParameters(n)
        force.setComputedValueParameters(n, name, expression.replace(old, new), kind)
    for n in range(force.getNumEnergyTerms()):
        expression, kind = force.getEnergyTermParameters(n)
        force.setEnergyTermParameters(n, expression.replace(old, new), kind)
    return system


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (external, "CustomExternalForce"),
        (constrained, "constraints"),
        (virtual, "virtual sites"),
        (lambda: periodic(openmm.NonbondedForce()), "NonbondedForce with periodic boundaries"),
        (lambda: periodic(openmm.GBSAOBCForce()), "GBSAOBCForce with periodic boundaries"),
        (periodic_bonds, "HarmonicBondForce with periodic boundaries"),
        (with_offsets, "parameter offsets"),
        (lambda: random_born(GBSAHCTForce), "CustomGBForce of another model"),
        (lambda: changed_born("psi^3", "psi^5"), "CustomGBForce of another model"),
        (lambda: changed_born("exp(-r^2/(4", "exp(-r^2/(8"), "CustomGBForce of another model"),
        (lambda: changed_born("(radius/B)^6", "(radius/B)^2"), "CustomGBForce of another model"),
        (lambda: changed_born("1/L-1/U", "1/L-2/U"), "CustomGBForce of another model"),
    ],
)
def test_unknown_force_is_named_and_openmm_offered(build, named):
    with pytest.raises(UserError, match=rf"{named}.*energy_backend=openmm"):
        TorchForceField(build())


def test_force_field_with_unknown_forces_is_refused_and_computed_by_openmm(tmp_path):
    wall = tmp_path / "wall.xml"
    wall.write_text("""<ForceField><Script>
import openmm
wall = openmm.CustomExternalForce("x^2")
for n in range(sys.getNumParticles()): wall.addParticle(n, [])
sys.addForce(wall)
</Script></ForceField>""")
    settings = {"forcefield": ["amber99sbildn.xml", str(wall)]}
    with pytest.raises(UserError, match=r"CustomExternalForce.*energy_backend=openmm"):
        load_system("aldp", **settings)
    system = load_system("aldp", **settings, energy_backend="openmm")
    assert system.energy(system.positions[None]).isfinite().all()


def test_numbers_in_the_expressions_are_those_that_count():
    system = changed_born("2.909125", "3.5e0")
    x = distorted(torch.zeros(2, N_ATOMS, 3, dtype=torch.float64), 0.3)
    assert math.isclose(float(CustomGB(system.getForce(0), N_ATOMS).gamma[0]), 3.5)
    torch.testing.assert_close(TorchForceField(system)(x), reference(system, x)[0])


def test_reduced_precision_of_matrix_products_does_not_move_atoms(thermal):
    field = TorchForceField(from_files(*FIELDS["amber99+obc"]))
    exact = energy_and_force(field, thermal.float())
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = energy_and_force(field, thermal.float())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(reduced, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amber99+obc", "amber14+gbn2, cutoff", "amber19 (CMAP)"])
def test_fused_equals_eager(name, thermal):
    """Energies and forces of batches under, at and over the size of the kernel, strained conformers among them."""
    system = from_files(*FIELDS[name])
    eager, fused = TorchForceField(system, compile=False), TorchForceField(system, compile=True)
    size = fused.chunk_size(torch.device("cpu"))
    x = torch.cat([thermal, wild(thermal)]).float()
    x = distorted(x.repeat(size // len(x) + 1, 1, 1), 1e-3)
    for n in (3, size // 2, size, len(x)):
        for result, expected in zip(energy_and_force(fused, x[:n]), energy_and_force(eager, x[:n]), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-2 * float(expected.abs().median()))
        torch.testing.assert_close(fused(x[:n]), eager(x[:n]), rtol=1e-5, atol=1e-2)
    kernels = fused._fused.compiled
    assert len(kernels) == 2
    assert all(kernel is not fused._fused.eager[kind] for (kind, *_), kernel in kernels.items())


@pytest.mark.parametrize("expression", ["k*(theta-theta0)^4", "k*(theta-theta0)^2"])
def test_other_torsions_are_refused(expression):
    system = with_forces(harmonic([1, 4, 6, 8, 14, 16, 18], expression))
    with pytest.raises(UserError, match=r"CustomTorsionForce.*energy_backend=openmm"):
        TorchForceField(system)
