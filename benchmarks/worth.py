"""The block of docs/cpu.md that says what each set of kernels is worth on which processor, from the rows of stage
`sets`."""

from collections.abc import Iterator
from statistics import median

from benchmarks.sets import PEERS
from benchmarks.tables import SHORT, Machine, grouped, number, table

Rows = dict[str, list[dict]]  # by method, in one order of cases


def sets(found: list[Machine], figures: str) -> str:
    rows = {machine.name: methods_of(machine) for machine in found}
    measured = [machine for machine in found if rows[machine.name]]
    if not measured:
        return ""
    every = [row for machine in measured for methods in rows[machine.name].values() for row in methods]
    kinds, shapes = (list(dict.fromkeys(row[key] for row in every)) for key in ("data", "shape"))
    lines = [line for machine in measured for line in lines_of(machine, rows[machine.name], shapes, kinds)]
    key = f"Share of sgemm on {' / '.join(kinds)}:"
    words = [in_words(machine, rows[machine.name]) for machine in measured]
    sizes = [shape.replace(" x ", ", ") for shape in shapes]
    return "\n\n".join([*words, key, table(["processor", "search by", *sizes, "wrong indices"], lines)])


def methods_of(machine: Machine) -> Rows:
    """Those of ours first, the fastest before the others."""
    rows: Rows = {}
    for row in machine.rows("sets"):
        if "share_of_ceiling" in row:
            rows.setdefault(row["method"], []).append(row)
    return dict(sorted(rows.items(), key=lambda item: (item[0] in PEERS, -middle(item[1], "share_of_ceiling"))))


def middle(rows: list[dict], key: str) -> float:
    return median(row[key] for row in rows)


def lines_of(machine: Machine, methods: Rows, shapes: list[str], kinds: list[str]) -> list[list[str]]:
    lines, title = [], machine.processor
    for method, rows in methods.items():
        share = {(row["shape"], row["data"]): f"{row['share_of_ceiling']:.2f}" for row in rows}
        cells = [" / ".join(share.get((shape, kind), "-") for kind in kinds) for shape in shapes]
        lines.append([title, named(method), *cells, counted(rows)])
        title = ""
    return lines


def named(method: str) -> str:
    return SHORT.get(method, method) if method in PEERS else f"`{method.removeprefix('vqops ')}`"


def counted(rows: list[dict]) -> str:
    return f"{sum(row['wrong'] for row in rows)} of {grouped(sum(row['checked'] for row in rows))}"


def in_words(machine: Machine, methods: Rows) -> str:
    """How the set that vqops chooses does against sgemm and against all else, and where it is not the fastest."""
    about, chosen = machine.rows("sets")[0], f"vqops {machine.rows('sets')[0]['instructions']}"
    calls = f" ({about['device']})" if about["device"] != machine.processor else ""
    threads = f"{about['threads']} thread" + "s" * (about["threads"] != 1)
    title = f"**{machine.processor}**{calls}, {threads}, commit `{about['commit']}`:"
    if chosen not in methods:
        return f"{title} {named(chosen)}, which vqops chooses, was not measured."
    ours = f"vqops chooses {named(chosen)}, which searches at {span(methods[chosen], 'share_of_ceiling')} times the"
    others = [f"{named(method)} {span(rows, 'times_vqops')}" for method, rows in methods.items() if method != chosen]
    faster = [each for method, rows in methods.items() for each in faster_on(method, rows)]
    slower = f" Faster than it: {'; '.join(faster)}." if faster else " Nothing was faster."
    return f"{title} {ours} rate of sgemm. Of its time take {', '.join(others)}.{slower}"


def faster_on(method: str, rows: list[dict]) -> Iterator[str]:
    """The kinds of data on which a method is faster than the set that vqops chooses."""
    for kind in dict.fromkeys(row["data"] for row in rows):
        times = [row["times_vqops"] for row in rows if row["data"] == kind]
        less = [time for time in times if time < 1]
        if less:
            yield f"{named(method)} on {kind} ({len(less)} of {len(times)} sizes, down to {number(min(less))})"


def span(rows: list[dict], key: str) -> str:
    """The median, and the least and the most."""
    values = [row[key] for row in rows]
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"
