"""Who may hold how much memory: the promise is written down before a byte moves.

Why it exists: two restores that start together must not both count on the same free bytes, so
each reserves first, and commits what it measured or rolls back. Called by the supervisor, for
VRAM and, with one device named HOST, for host memory. Immutable: every operation returns a new
ledger or raises and changes nothing. It knows no clock and no process. All figures are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

HOST: Final = "host"
UNLIMITED_BYTES: Final = 1 << 62


class OverCapacityError(Exception):
    """A reservation would exceed the budget or the device: plan an eviction first."""


class UnknownChargeError(Exception):
    """Commit or rollback of what was never reserved: a fault of the supervisor."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What one model is charged on one device; not committed while its transition runs."""

    device: str
    held_bytes: int
    is_committed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Charges of models against a budget over all devices and a capacity of each."""

    budget_bytes: int
    capacity_bytes: Mapping[str, int]
    """Of each device: its total less the headroom, never negative."""
    charges: Mapping[str, Charge] = field(default_factory=lambda: MappingProxyType({}))
    learned_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """The most that each model was ever measured to hold."""
    hinted_bytes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """What an earlier boot measured; counts until this one has measured the model itself."""

    @property
    def charged_bytes(self) -> int:
        """Sum of all charges."""
        return sum(charge.held_bytes for charge in self.charges.values())

    def charged_on(self, device: str) -> int:
        """Sum of the charges on one device."""
        return sum(c.held_bytes for c in self.charges.values() if c.device == device)

    def uncommitted_on(self, device: str) -> int:
        """Sum of the reservations on one device whose bytes may not be measurable yet."""
        return sum(
            c.held_bytes for c in self.charges.values() if c.device == device and not c.is_committed
        )

    def budget_left_bytes(self) -> int:
        """What the budget still admits; negative when measurements or a new config overtook it."""
        return self.budget_bytes - self.charged_bytes

    def device_left_bytes(self, device: str) -> int:
        """What the device's capacity still admits; negative as above."""
        return self.capacity_of(device) - self.charged_on(device)

    def capacity_of(self, device: str) -> int:
        """Capacity of a device; without limit where the device is unknown."""
        return self.capacity_bytes.get(device, UNLIMITED_BYTES)

    def available_bytes(self, device: str) -> int:
        """The lesser of what budget and device still admit."""
        return min(self.budget_left_bytes(), self.device_left_bytes(device))

    def limit_bytes(self, device: str) -> int:
        """The most that a single model could ever hold there."""
        return min(self.budget_bytes, self.capacity_of(device))

    def expected_bytes(self, model: str, declared_bytes: int, weight_bytes: int) -> int:
        """What the model is expected to hold: the largest of declared, learned and its weights.

        Learned is what this boot measured, else what an earlier one did. The latter never makes a
        model too large for every device: it is measured once more before it is refused.
        """
        largest = max(map(self.limit_bytes, self.capacity_bytes), default=self.budget_bytes)
        hinted = min(self.hinted_bytes.get(model, 0), largest)
        return max(declared_bytes, self.learned_bytes.get(model, hinted), weight_bytes)

    def reserve(self, model: str, device: str, wanted_bytes: int) -> Ledger:
        """Charge a model before its transition. Raises OverCapacityError; replaces nothing."""
        if wanted_bytes < 0 or model in self.charges:
            raise OverCapacityError(f"{model} holds a charge already or asks for {wanted_bytes}")
        if wanted_bytes and wanted_bytes > self.available_bytes(device):
            raise OverCapacityError(
                f"{model} needs {wanted_bytes} bytes on {device or 'its device'}, "
                f"{max(0, self.available_bytes(device))} are left"
            )
        return self._with(model, Charge(device, wanted_bytes))

    def commit(self, model: str, measured_bytes: int, declared_bytes: int) -> Ledger:
        """Turn a reservation into the larger of declared and measured bytes.

        Never refuses: the bytes are in use. What exceeds the budget then shows as negative
        ``budget_left_bytes``, which the policy turns into evictions.
        """
        charge = self.charges.get(model)
        if charge is None:
            raise UnknownChargeError(f"{model} has reserved nothing")
        learned = max(self.learned_bytes.get(model, 0), measured_bytes)
        held = Charge(charge.device, max(declared_bytes, measured_bytes), is_committed=True)
        return replace(
            self._with(model, held),
            learned_bytes=MappingProxyType({**self.learned_bytes, model: learned}),
        )

    def release(self, model: str) -> Ledger:
        """Take the charge back: after a rollback, an offload or a death. Idempotent."""
        rest = {name: charge for name, charge in self.charges.items() if name != model}
        return replace(self, charges=MappingProxyType(rest))

    def forget(self, model: str) -> Ledger:
        """Release, and forget the learned size too: the model behind the name is another now."""
        learned = {name: size for name, size in self.learned_bytes.items() if name != model}
        hinted = {name: size for name, size in self.hinted_bytes.items() if name != model}
        return replace(
            self.release(model),
            learned_bytes=MappingProxyType(learned),
            hinted_bytes=MappingProxyType(hinted),
        )

    def with_hint(self, model: str, expected_bytes: int) -> Ledger:
        """Take what an earlier boot measured."""
        hinted = MappingProxyType({**self.hinted_bytes, model: expected_bytes})
        return replace(self, hinted_bytes=hinted)

    def with_limits(self, budget_bytes: int, capacity_bytes: Mapping[str, int]) -> Ledger:
        """Take new limits; the charges stay, even where they now exceed them."""
        return replace(
            self, budget_bytes=budget_bytes, capacity_bytes=MappingProxyType(dict(capacity_bytes))
        )

    def _with(self, model: str, charge: Charge) -> Ledger:
        return replace(self, charges=MappingProxyType({**self.charges, model: charge}))
