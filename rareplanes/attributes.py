"""Facts about the makes of aircraft that RarePlanes renders: role, engines, wing, tail.

The facts are those of the RarePlanes dataset (Shermeyer, Hossler, Van Etten, Hogan, Lewis, Kim:
"RarePlanes Dataset", In-Q-Tel CosmiQ Works & AI.Reverie, June 2020, CC BY-SA 4.0), kept under
the same licence in `aircraft.csv` beside this file, one line per make. Ids are derived from the
names, because the published table stores both and gives Tupolev_154 the id of another role.
"""

import csv
from functools import cache
from pathlib import Path

from common.cli import UserError

TABLE = Path(__file__).with_name("aircraft.csv")

ATTRIBUTES = (
    "role",
    "num_engines",
    "propulsion",
    "wing_position",
    "wing_type",
    "canards",
    "num_tail_fins",
    "faa_wingspan_class",
    "make",
)

# In the order of the dataset's role_id 1…7, so that our category ids equal its role_ids.
ROLES = (
    "Small Civil Transport/Utility",
    "Medium Civil Transport/Utility",
    "Large Civil Transport/Utility",
    "Military Transport/Utility/AWAC",
    "Military Bomber",
    "Military Fighter/Interceptor/Attack",
    "Military Trainer",
)


# Further values, which only the real half has. They come last, so that the others keep their ids.
REAL = {
    "num_engines": ("0",),
    "num_tail_fins": ("0", "3"),
    "wing_type": ("delta", "variable swept"),
}
REAL |= {"propulsion": ("unpowered",), "canards": ("yes",)}


@cache
def makes() -> dict[str, dict[str, str]]:
    """The facts of each make, by its name."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {row["make"]: row for row in csv.DictReader(file)}


def categories(attribute: str | None) -> list[str]:
    """Names of the classes that an attribute divides aircraft into; None: one class, `aircraft`.

    The list depends on no scene, so class ids are the same for every split, every run and both
    halves. Roles are in the dataset's order. All others are those of the table, sorted, and then
    those of the real half.
    """
    if attribute is None:
        return ["aircraft"]
    if attribute == "role":
        return list(ROLES)
    values = sorted({facts[attribute] for facts in makes().values()})
    return values + [value for value in REAL.get(attribute, ()) if value not in values]


def category(make: str, attribute: str | None) -> str:
    """Name of the class of a make.

    Raises:
        UserError: the table has no such make.
    """
    if attribute is None:
        return "aircraft"
    facts = makes().get(make)
    if facts is None:
        raise UserError(
            f"the make {make!r} is not in {str(TABLE)!r}, so its {attribute} is not known; "
            "add a line for it, or leave out --attribute."
        )
    return facts[attribute]
