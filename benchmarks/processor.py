"""What tells processors apart that share a name: a virtual machine calls a Zen 3 and a Zen 4 both "AMD EPYC"."""

import re
from pathlib import Path

MARKS = re.compile(r"\((?:R|TM)\)| Processor\b")
CPUINFO = Path("/proc/cpuinfo")
FACTS = {"vendor": "vendor_id", "family": "cpu family", "model": "model", "stepping": "stepping"}
# Families and models as arch/x86/kernel/cpu/amd.c and arch/x86/include/asm/intel-family.h of Linux have them.
KNOWN = {
    ("AuthenticAMD", 25): {
        "Zen 3": (*range(0x00, 0x10), *range(0x20, 0x60)),
        "Zen 4": (*range(0x10, 0x20), *range(0x60, 0xB0)),
    },
    ("AuthenticAMD", 26): {"Zen 5": (*range(0x00, 0x30), *range(0x40, 0x50), *range(0x70, 0x80))},
    ("GenuineIntel", 6): {
        "Skylake-SP or Cascade Lake": (85,),
        "Ice Lake-SP": (106,),
        "Sapphire Rapids": (143,),
        "Emerald Rapids": (207,),
        "Granite Rapids": (173, 174),
    },
}


def plain(name: str) -> str:
    """Without marks: Intel Xeon, of Intel(R) Xeon(R) Processor."""
    return MARKS.sub("", name)


def facts() -> dict[str, str | int]:
    """Vendor, family, model and stepping, and the microarchitecture of those that are known; empty where no
    /proc/cpuinfo says them."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text().partition("\n\n")[0]
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    found = {name: said[key] for name, key in FACTS.items() if key in said}
    found = {name: int(value) if value.isdigit() else value for name, value in found.items()}
    name = microarchitecture(found)
    return found | ({"microarchitecture": name} if name else {})


def microarchitecture(found: dict[str, str | int]) -> str | None:
    models = KNOWN.get((found.get("vendor"), found.get("family")), {})
    return next((name for name, known in models.items() if found.get("model") in known), None)
