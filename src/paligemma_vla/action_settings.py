"""What `data.actions` means for one robot's data: names to numbers, the gripper left out, and all that contradicts it."""

from __future__ import annotations

from paligemma_vla.actions import ABSOLUTE, ActionTransform, called
from paligemma_vla.config import ActionsConfig, Dimension, VLAConfig
from paligemma_vla.errors import ConfigError, closest
from paligemma_vla.schema import DatasetMetadata

GRIPPER = "gripper"
DEGREES = ("deg", "degree", "degrees", "°")
Numbers = tuple[int, ...]


def resolve_actions(config: VLAConfig, metadata: DatasetMetadata, state_dim: int, action_dim: int) -> ActionTransform:
    """What `data.actions` means for data of these dimensions. Raises `ConfigError` with everything that it cannot mean."""
    settings = config.data.actions
    resolver = _Resolver(settings, metadata, state_dim, action_dim)
    rotation, turned = resolver.rotation()
    if settings.representation == "absolute":
        resolver.tell()
        return ABSOLUTE
    dimensions = resolver.dimensions()
    starts = resolver.state_dimensions(dimensions)
    resolver.check(dimensions, starts, rotation, turned)
    resolver.tell()
    if not set(turned) <= set(dimensions):  # named, and left as recorded
        rotation, turned = "", ()
    horizon = config.model.action_head_config.horizon
    return ActionTransform(settings.representation, dimensions, starts, rotation, turned, horizon)


def taken_by_number(config: VLAConfig, metadata: DatasetMetadata) -> bool:
    """Whether actions and state have names and share none, so that only their numbers say what belongs together."""
    names = set(metadata.action_names), set(metadata.state_names)
    return config.data.actions.state_dimensions is None and all(names) and not names[0] & names[1]


class _Resolver:
    """One configuration against one robot; faults are gathered until `tell`."""

    def __init__(self, settings: ActionsConfig, metadata: DatasetMetadata, state_dim: int, action_dim: int) -> None:
        self.settings, self.metadata = settings, metadata
        self.sizes = {"action": action_dim, "state": state_dim}
        self.names = {"action": metadata.action_names, "state": metadata.state_names}
        self.units = {"action": metadata.action_units, "state": metadata.state_units}
        self.faults: list[str] = []

    def tell(self) -> None:
        """Raise `ConfigError` with every fault found."""
        if self.faults:
            raise ConfigError("\n".join(self.faults))

    def rotation(self) -> tuple[str, Numbers]:
        """Representation and dimensions of the rotation in the actions, or nothing."""
        named, said = self.settings.rotation, self.metadata.action_rotation
        if named is None:
            if said and self.settings.representation != "absolute":
                text = f"got null, but the data's actions hold a rotation as {said}, which cannot be subtracted"
                self._fault("rotation", f"{text}; name its dimensions")
            return "", ()
        if said and said != named.representation:
            self._fault("rotation.representation", f"got {named.representation}, expected {said} as the data says")
        return named.representation, self._numbers(named.dimensions, "action", "rotation.dimensions")

    def dimensions(self) -> Numbers:
        """Dimensions of an action that are converted."""
        names, size = self.names["action"], self.sizes["action"]
        if self.metadata.action_representation == "delta":
            text = f"got {self.settings.representation}, but the data's actions are deltas already"
            self._fault("representation", f"{text}; take absolute, which leaves them as recorded")
        if self.settings.dimensions is not None:
            return self._numbers(self.settings.dimensions, "action", "dimensions")
        if len(names) != size:
            text = f"got null, but the data does not name its {size} action dimensions; list the numbers of those to convert"
            self._fault("dimensions", f"{text} (0 is the first), without the gripper's")
            return ()
        found = tuple(number for number, name in enumerate(names) if GRIPPER not in name.casefold())
        if not found:
            self._fault("dimensions", f"got null, but all of {', '.join(names)} are a gripper's; list those to convert")
        return found

    def state_dimensions(self, dimensions: Numbers) -> Numbers:
        """For each converted dimension the one of the state that it starts from: of the same name, else of the same number."""
        key, given, names = "state_dimensions", self.settings.state_dimensions, self.names["state"]
        if given is not None:
            return self._numbers(given, "state", key)
        wanted = [called(number, self.names["action"]) for number in dimensions]
        missing = [name for name in wanted if names.count(name) != 1]
        if not missing:
            return tuple(names.index(name) for name in wanted)
        if len(missing) < len(wanted):
            text = f"got null, but the state has no dimension (or several) of the name {', '.join(missing)}, only the others'"
            self._fault(key, f"{text}; it has {', '.join(names)}: list them")
            return ()
        for number, name in zip(dimensions, wanted, strict=True):
            if number >= self.sizes["state"]:
                text = f"got null, but the state has {self.sizes['state']} numbers, none for dimension {number} ({name})"
                self._fault(key, f"{text} of an action; list them, or leave it out of data.actions.dimensions")
        return dimensions

    def check(self, dimensions: Numbers, starts: Numbers, rotation: str, turned: Numbers) -> None:
        """What does not fit together: a rotation that is converted in part, and units."""
        left = [called(number, self.names["action"]) for number in turned if number not in dimensions]
        if 0 < len(left) < len(turned):
            text = f"{', '.join(left)} are not among those converted; a rotation is converted as a whole, or not at all"
            self._fault("rotation.dimensions", text)
        for number, start in zip(dimensions, starts, strict=False):  # their lengths differ where there is a fault already
            unit, other = self._unit(number, "action"), self._unit(start, "state")
            name, state_name = called(number, self.names["action"]), called(start, self.names["state"])
            if unit and other and unit != other:
                text = f"action {name} is in {unit}, state {state_name} in {other}"
                self._fault("state_dimensions", f"{text}; list dimensions of one unit, or leave it out of dimensions")
            if number in turned and rotation in ("euler_xyz", "rotvec") and unit in DEGREES:
                self._fault("rotation", f"action {name} is in {unit}, expected rad; convert the data")

    def _unit(self, number: int, column: str) -> str:
        units = self.units[column]
        return units[number] if number < len(units) else ""

    def _numbers(self, given: tuple[Dimension, ...], column: str, key: str) -> Numbers:
        """Dimensions given by number or name, as numbers."""
        names, size = self.names[column], self.sizes[column]
        numbers = []
        for entry in given:
            if isinstance(entry, int) and entry >= size:
                self._fault(key, f"got {entry}, expected at most {size - 1}: the data has {size} {column} dimensions")
            elif isinstance(entry, str) and names.count(entry) != 1:
                remedy = closest(entry, names) or "; it names none: give numbers (0 is the first)"
                what = "the name of several" if entry in names else "none of the data's"
                self._fault(key, f"got '{entry}', {what} {column} dimensions{remedy}")
            else:
                numbers.append(entry if isinstance(entry, int) else names.index(entry))
        if len(set(numbers)) < len(numbers):
            self._fault(key, f"got {list(given)}, expected each dimension once")
        return tuple(numbers)

    def _fault(self, key: str, text: str) -> None:
        self.faults.append(f"data.actions.{key}: {text}")
