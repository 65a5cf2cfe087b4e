"""Generalized Born solvation: one energy, and the Born radii of the OBC1, OBC2, GBn and GBn2 models.

OpenMM has it as GBSAOBCForce (OBC2) and, from ``implicit/*.xml``, as a CustomGBForce whose expressions tell the model.
"""

import math
import re
from typing import Any

import openmm
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.systems.terms.geometry import COULOMB, Geometry, Term, column, columns, cutoff_of, plain, unknown

__all__ = ["GBSAOBC", "CustomGB"]

OBC_OFFSET = 0.009  # nm, subtracted from the intrinsic radii
OBC2 = (1.0, 0.8, 4.85)  # α, β, γ of model II, Onufriev, Bashford & Case, Proteins 55, 383 (2004)
PROBE_RADIUS = 0.14  # nm, of the surface-area term
NECK_SQUARE, NECK_SIXTH = 100.0, 0.3e6  # nm⁻², nm⁻⁶; 1 Å⁻² and 0.3 Å⁻⁶ in the paper
NECK_REACH = 2.0  # nm; beyond every neck, whose sixth power would overflow in float32 further out


class GeneralizedBorn(Term):
    """-½ k Σᵢⱼ (1/ε_in - exp(-κf)/ε_out) qᵢqⱼ (1/f - 1/r_c), f² = r² + BᵢBⱼ exp(-r²/4BᵢBⱼ); surface Σ s (ρ/B)⁶.

    f: Still et al., J. Am. Chem. Soc. 112, 6127 (1990); κ: Srinivasan et al., Theor. Chem. Acc. 101, 426 (1999);
    the surface: Schaefer, Bartels & Karplus, J. Mol. Biol. 284, 835 (1998), eq. 2, in TINKER's sixth power.
    Born radii B (``inverse_born_radii``): Onufriev, Bashford & Case 2004, eqs. 2-6.
    With a cutoff r_c, pairs further apart count neither here nor in the radii; terms i = j are not shifted.

    Args (per atom (n_atoms,), nm and kJ/mol):
        charge: q in elementary charges; radius: ρ; own: ρ less an offset; scaled: own times the descreening factor.
        curve: α, β, γ, numbers or per atom.
        coulomb, solute, solvent, kappa: k, ε_in, ε_out, κ in nm⁻¹.
        surface: s per atom, times ρ⁶.
        cutoff, shift: r_c and 1/r_c.
        neck: height, centre and end (nm) of each ordered pair's neck (n_atoms, n_atoms), or None.
        buried: whether an atom whose sphere lies wholly inside another's loses the volume in between as well.
    """

    def __init__(
        self,
        *,
        charge: Tensor,
        radius: Tensor,
        own: Tensor,
        scaled: Tensor,
        curve: tuple[Tensor | float, Tensor | float, Tensor | float],
        coulomb: float,
        solute: float,
        solvent: float,
        surface: Tensor,
        cutoff: float | None,
        shift: float,
        kappa: float = 0.0,
        neck: tuple[Tensor, Tensor, Tensor] | None = None,
        buried: bool = False,
    ):
        super().__init__()
        n_atoms = len(charge)
        others = 1 - torch.eye(n_atoms, dtype=torch.float64)  # by which no atom descreens itself
        self.cutoff, self.shift, self.kappa, self.buried = cutoff, shift, kappa, buried
        self.solute, self.solvent = solute, solvent
        prefactor = -coulomb * (1.0 if kappa else 1 / solute - 1 / solvent)
        alpha, beta, gamma = (torch.as_tensor(c, dtype=torch.float64).expand(n_atoms)[:, None].clone() for c in curve)
        self.table(
            own=own[:, None],
            inverse_radius=1 / radius[:, None],
            scaled=(scaled * others)[..., None],
            pair=(0.5 * prefactor * charge[:, None] * charge * others)[..., None],
            self_energy=0.5 * prefactor * charge.square(),
            surface=surface,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
        )
        self.negative = bool((scaled < 0).any())  # as GBn2's sulfur has it
        self.neck = neck is not None
        if neck is not None:
            height, centre, end = (matrix[..., None] for matrix in neck)
            self.table(neck_height=height * others[..., None], neck_centre=centre, neck_end=end)

    def forward(self, geometry: Geometry) -> Tensor:
        inverse_born = self.inverse_born_radii(geometry)
        pair = StillDistance.apply(geometry.squared_distances, inverse_born).rsqrt()
        own = inverse_born
        if self.kappa:
            own, screening = own * self.screening(own), self.screening(pair)
        if self.shift:
            pair = pair - self.shift
        if self.kappa:
            pair = pair * screening
        if self.cutoff is not None:
            pair = pair * geometry.within(self.cutoff)
        return (self.pair * pair).sum((0, 1)) + self.self_energy @ own + self.surface @ inverse_born.square() ** 3

    def screening(self, inverse: Tensor) -> Tensor:
        """1/ε_in - exp(-κf)/ε_out, from 1/f."""
        return 1 / self.solute - torch.exp(-self.kappa / inverse) / self.solvent

    def inverse_born_radii(self, geometry: Geometry) -> Tensor:
        """1/B = 1/ρ̃ - tanh(αΨ - βΨ² + γΨ³) / ρ with Ψ = ρ̃ I; (n_atoms, batch), nm⁻¹.

        I is half the descreening by all others, and in GBn and GBn2 what fills necks too narrow for water.
        """
        integral = Descreening.apply(geometry.squared_distances, self.own[:, None], self.scaled, self.buried)
        if self.negative:
            integral = integral * (geometry.distances + self.scaled > self.own[:, None])
        if self.neck:
            integral = integral + 2 * self.neck_integral(geometry.distances)
        if self.cutoff is not None:
            integral = integral * geometry.within(self.cutoff)
        psi = 0.5 * self.own * integral.sum(1)
        curve = psi * (self.alpha + psi * (-self.beta + psi * self.gamma))
        return 1 / self.own - torch.tanh(curve) * self.inverse_radius

    def neck_integral(self, r: Tensor) -> Tensor:
        """S m₀ / (1 + (r - d₀)² + 0.3 (r - d₀)⁶), lengths in Å (Mongan et al., J. Chem. Theory Comput. 3, 156 (2007)).

        Constants of GBn2: Nguyen, Roe & Simmerling, J. Chem. Theory Comput. 9, 2020 (2013).
        """
        square = (r - self.neck_centre).clamp(max=NECK_REACH).square()
        return self.neck_height / (1 + square * (NECK_SQUARE + NECK_SIXTH * square * square)) * (r <= self.neck_end)


class Descreening(torch.autograd.Function):
    """Twice what a sphere of radius ``scaled`` at r takes from the Coulomb integral outside one of radius ``own``.

    The integral has kinks where the spheres touch, but its limits do not enter its derivative: writing that by hand
    saves most of the backward pass. Hawkins, Cramer & Truhlar, J. Phys. Chem. 100, 19824 (1996), eqs. 10-13.
    """

    @staticmethod
    def forward(ctx, r2: Tensor, own: Tensor, scaled: Tensor, buried: bool) -> Tensor:
        r, inverse_r, start, lower, upper = Descreening.limits(r2, own, scaled)
        spheres = (upper - lower) * (0.25 * (r - scaled * scaled * inverse_r) * (upper + lower) - 1)
        integral = spheres + 0.5 * torch.log(start * upper) * inverse_r
        if buried:
            integral = integral + 2 * (r < scaled) * (1 / own - lower)
        ctx.save_for_backward(r2, own, scaled, integral)
        ctx.buried = buried
        return integral

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """By r: (U² - L²) / 2 - (I + U - L) / r, in which the integral I stands for its logarithm."""
        r2, own, scaled, integral = ctx.saved_tensors
        r, inverse_r, _, lower, upper = Descreening.limits(r2, own, scaled)
        if ctx.buried:
            integral = integral - 2 * (r < scaled) * (1 / own - lower)
        gap = upper - lower
        slope = 0.5 * gap * (upper + lower) - (integral + gap) * inverse_r
        if not ctx.buried:
            # Inside the other sphere the lower limit does enter, unless the buried volume is added, which cancels it.
            slope = slope + 2 * (r < scaled - own) * lower * lower
        return 0.5 * grad * slope * inverse_r, None, None, None

    @staticmethod
    def limits(r2: Tensor, own: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r, 1/r, 1/L, and the inverse limits L and U of the integral, by a single division.

        The limits are equal, so that it is zero, for a neighbour inside the own sphere.
        """
        r = r2.sqrt()
        start, end = torch.maximum((r - scaled).abs(), own), torch.maximum(r + scaled, own)
        product = start * end
        inverse = 1 / (r * product)
        factor = r * inverse
        return r, product * inverse, start, end * factor, start * factor


class StillDistance(torch.autograd.Function):
    """f² = r² + exp(-r² p / 4) / p, p = 1/BᵢBⱼ, of r² (n_atoms, n_atoms, batch) and of 1/B (n_atoms, batch).

    By hand because p is symmetric: one sum for each atom gives its gradient, where autograd sums over rows and columns.
    """

    @staticmethod
    def forward(ctx, r2: Tensor, inverse_born: Tensor) -> Tensor:
        ctx.save_for_backward(r2, inverse_born)
        return r2 + StillDistance.parts(r2, inverse_born)[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        r2, inverse_born = ctx.saved_tensors
        p, decay = StillDistance.parts(r2, inverse_born)
        part = grad * decay
        both = part + part.transpose(0, 1)
        return grad - 0.25 * p * part, -(both * (1 + 0.25 * r2 * p)).sum(1) / inverse_born

    @staticmethod
    def parts(r2: Tensor, inverse_born: Tensor) -> tuple[Tensor, Tensor]:
        p = inverse_born.unsqueeze(0) * inverse_born.unsqueeze(1)
        return p, torch.exp(-0.25 * r2 * p) / p


class GBSAOBC(GeneralizedBorn):
    """OpenMM's GBSAOBCForce: OBC2 radii, buried spheres as in TINKER, and a surface term 4πγ (ρ + 0.14 nm)² (ρ/B)⁶."""

    def __init__(self, force: openmm.GBSAOBCForce, n_atoms: int):
        cutoff = cutoff_of(force)
        charge, radius, scale = map(column, columns(force.getParticleParameters, n_atoms))
        tension = plain([force.getSurfaceAreaEnergy()])[0]
        super().__init__(
            charge=charge,
            radius=radius,
            own=radius - OBC_OFFSET,
            scaled=scale * (radius - OBC_OFFSET),
            curve=OBC2,
            coulomb=COULOMB,
            solute=force.getSoluteDielectric(),
            solvent=force.getSolventDielectric(),
            surface=4 * math.pi * tension * (radius + PROBE_RADIUS).square() * radius**6,
            cutoff=cutoff,
            shift=1 / cutoff if cutoff else 0.0,
            buried=True,
        )


class CustomGB(GeneralizedBorn):
    """OpenMM's CustomGBForce of ``implicit/obc1.xml``, ``obc2.xml``, ``gbn.xml`` or ``gbn2.xml``, its own constants.

    Recognized by its expressions: those of ``openmm.app.internal.customgbforces`` up to their numbers.
    """

    def __init__(self, force: openmm.CustomGBForce, n_atoms: int):
        names = [force.getPerParticleParameterName(n) for n in range(force.getNumPerParticleParameters())]
        values = [force.getComputedValueParameters(n) for n in range(force.getNumComputedValues())]
        wanted = [("I", force.ParticlePairNoExclusions), ("B", force.SingleParticle)]
        if [(name, kind) for name, _, kind in values] != wanted:
            raise unrecognized()
        if force.getNumGlobalParameters() or not {"charge", "or", "sr"} <= set(names):
            raise unrecognized()
        atoms = {name: column(v) for name, v in zip(names, columns(force.getParticleParameters, n_atoms), strict=True)}
        integral, born = (read(v[1], *templates) for v, templates in zip(values, (INTEGRALS, RADII), strict=True))
        energies = {}
        for n in range(force.getNumEnergyTerms()):
            expression, kind = force.getEnergyTermParameters(n)
            single = kind == force.SingleParticle
            if kind == force.ParticlePair:
                raise unrecognized()
            key = "pair" if not single else "surface" if "radius" in expression else "self"
            if key in energies:
                raise unrecognized()
            energies[key] = read(expression, *ENERGIES[key])
        if not {"self", "pair"} <= set(energies):
            raise unrecognized()
        shared = ("coulomb", "soluteDielectric", "solventDielectric", "screened")
        if any(energies["self"].get(key) != energies["pair"].get(key) for key in shared):
            raise unrecognized()
        own, pair = atoms["or"], energies["pair"]
        surface = torch.zeros_like(own)
        if "surface" in energies:
            radius = own + energies["surface"]["offset"]
            surface = energies["surface"]["scale"] * (radius + energies["surface"]["probe"]).square() * radius**6
        alpha, beta, gamma = (born[key] if key in born else atoms[key] for key in ("alpha", "beta", "gamma"))
        super().__init__(
            charge=atoms["charge"],
            radius=own + born["offset"],
            own=own,
            scaled=atoms["sr"],
            curve=(alpha, beta, gamma),
            coulomb=pair["coulomb"],
            solute=pair["soluteDielectric"],
            solvent=pair["solventDielectric"],
            kappa=pair["kappa"] if pair["screened"] else 0.0,
            surface=surface,
            cutoff=cutoff_of(force),
            shift=pair["shift"],
            neck=necks(force, atoms, integral) if "neckCut" in integral else None,
        )


def necks(
    force: openmm.CustomGBForce, atoms: dict[str, Tensor], constants: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Height (nm⁻¹), centre and end (nm) of the neck of each atom (row) with each other, from the force's tables."""
    tables = {}
    for n in range(force.getNumTabulatedFunctions()):
        width, depth, values = force.getTabulatedFunction(n).getFunctionParameters()
        tables[force.getTabulatedFunctionName(n)] = column(tuple(values)).view(depth, width).T
    kind = atoms["radindex"].round().long()
    radius = atoms["or"] + constants["offset"]
    height, centre = (tables[name][kind[:, None], kind] for name in ("getm0", "getd0"))
    return constants["neckScale"] * height, centre, radius[:, None] + radius + constants["neckCut"]


# The expressions of openmm.app.internal.customgbforces without spaces and assignments of numbers. <name> is a number.
SPHERES: tuple[str, dict[str, float]] = (
    "select(step(r+sr2-or1),0.5*(1/L-1/U+0.25*(r-sr2^2/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r),0);U=r+sr2;L=max(or1,D);D=abs(r-sr2)",
    {},
)
NECK: tuple[str, dict[str, float]] = (
    "Ivdw+neckScale*Ineck;Ineck=step(radius1+radius2+neckCut-r)*getm0(radindex1,radindex2)"
    "/(1+100*(r-getd0(radindex1,radindex2))^2+0.3*1000000*(r-getd0(radindex1,radindex2))^6);"
    f"Ivdw={SPHERES[0]};radius1=or1+offset;radius2=or2+offset",
    {},
)
INTEGRALS = (SPHERES, NECK)
RADII = tuple(
    (f"1/(1/or-tanh({polynomial})/radius);psi=I*or;radius=or+offset", defaults)
    for polynomial, defaults in (
        ("<alpha>*psi+<gamma>*psi^3", {"beta": 0.0}),  # OBC1
        ("psi-<beta>*psi^2+<gamma>*psi^3", {"alpha": 1.0}),  # OBC2
        ("<alpha>*psi-<beta>*psi^2+<gamma>*psi^3", {}),  # GBn
        ("alpha*psi-beta*psi^2+gamma*psi^3", {}),  # GBn2: per atom
    )
)
UNSCREENED, SCREENED = (f"(1/soluteDielectric-{salt}/solventDielectric)" for salt in ("1", "exp(-kappa*{f})"))
DISTANCE = "f=sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))"
ENERGIES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "self": tuple(
        (f"-0.5*<coulomb>*{factor.format(f='B')}*charge^2/B", {"screened": screened})
        for factor, screened in ((UNSCREENED, False), (SCREENED, True))
    ),
    "surface": (("<scale>*(radius+<probe>)^2*(radius/B)^6;radius=or+offset", {}),),
    "pair": tuple(
        (f"-<coulomb>*{factor.format(f='f')}*charge1*charge2{end};{DISTANCE}", {"screened": screened} | shift)
        for factor, screened in ((UNSCREENED, False), (SCREENED, True))
        for end, shift in (("/f", {"shift": 0.0}), ("*(1/f-<shift>)", {}))
    ),
}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def read(expression: str, *templates: tuple[str, dict]) -> dict[str, float]:
    """The constants of an expression (assigned and in place of <name>), with defaults of the template that fits."""
    formula, constants = [], {}
    for part in "".join(expression.split()).split(";"):
        name, _, value = part.partition("=")
        if re.fullmatch(NUMBER, value):
            constants[name] = float(value)
        elif part:
            formula.append(part)
    for template, defaults in templates:
        pattern = re.sub(r"<(\w+)>", lambda name: f"(?P<{name[1]}>{NUMBER})", re.escape(template))
        if found := re.fullmatch(pattern, ";".join(formula)):
            return constants | defaults | {name: float(value) for name, value in found.groupdict().items()}
    raise unrecognized()


def unrecognized() -> UserError:
    return unknown("CustomGBForce of another model than OBC1, OBC2, GBn and GBn2")
