"""Who decided what, how sure they are, and why it cannot be better: certificates in words."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap

from spotserve.core.plan_text.money import usd_text
from spotserve.core.plan_text.table import Json, count_text, seconds_text, size_text

MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "latency_us": ("least request latency", lambda value: seconds_text(value / 1e6)),
    "execution_us": ("least execution time", lambda value: seconds_text(value / 1e6)),
    "throughput_urps": ("most throughput", lambda value: f"{value / 1e6:.3g} requests/s"),
    "latency_ms": ("least request latency", lambda value: seconds_text(value / 1e3)),
    "throughput_rps": ("most throughput", lambda value: f"{value:.3g} requests/s"),
}
"""What *configure* optimises -> its name, and how a value of it is written."""
BYTE_KINDS = ("in_port", "out_ports", "storage", "port_prices", "nothing_to_copy", "assignment", "assignment_by_type")
"""Certificates of solvers whose objective is bytes: through a port at the link's rate, or left in place."""
LINE_WIDTH = 112
BOUND_TOLERANCE = 1.001
"""Bounds are rounded up to whole bytes of a port."""


def decision_lines(plan: Json) -> str:
    """Each solver with its status, objective, bound and gap, and the certificate below it."""
    lines = []
    for kind, report in sorted(plan["solver"].items()):
        lines.append(f"{kind} by {report['name']}: {report['status']}{_figures(report)}")
        for line in (certificate_text(plan, kind), _statistics(report)):
            lines += wrap(line, LINE_WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _figures(report: Json) -> str:
    if report["status"] in ("infeasible", "unknown"):
        return ""
    unit = _unit(report)
    return f", objective {unit(report['objective'])}, bound {unit(report['bound'])}, gap {report['gap']:.1%}"


def _unit(report: Json) -> Callable[[float], str]:
    """How the objective of a report is written: by its certificate, which says what is measured."""
    certificate = report["certificate"] or {}
    if certificate.get("measure") in MEASURES:
        return MEASURES[certificate["measure"]][1]
    if certificate.get("kind") in BYTE_KINDS:
        return size_text
    if certificate.get("kind") in ("all_fit", "prices"):
        return lambda value: seconds_text(value / 1e6)
    return lambda value: f"{value:g}"


def _statistics(report: Json) -> str:
    return f"search: {_pairs(report['statistics'])}" if report["statistics"] else ""


def _pairs(values: Json) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(values.items()))


def certificate_text(plan: Json, kind: str) -> str:
    """The certificate of one solver in words; one that is not known is printed as key=value."""
    report = plan["solver"][kind]
    certificate = report["certificate"]
    if not certificate:
        return ""
    words = _WORDS.get(str(certificate.get("kind")))
    try:
        return words(plan, kind, certificate) if words is not None else f"certificate: {_pairs(certificate)}"
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return f"certificate: {_pairs(certificate)}"


def _link_rate(plan: Json) -> float:
    return float(plan["spec"]["profile"]["link_bytes_per_s"])


def _takes(plan: Json, certificate: Json, num_ports: int = 1) -> tuple[float, float]:
    """(bytes/s of the ports of a certificate together, seconds that they need)."""
    rate = float(certificate.get("bytes_per_s") or _link_rate(plan) * num_ports)
    return rate, certificate["bytes"] / rate


def _conclusion(plan: Json, kind: str, takes_s: float) -> str:
    """What follows from ports that need `takes_s`."""
    report = plan["solver"][kind]
    if report["status"] == "optimal":
        # Splitting tensor groups is avoided before time is: the bound is of placements that do not split more.
        whole = " that splits tensor groups no more than this" if "group_parts" in (report["statistics"] or {}) else ""
        return f"no placement{whole} is faster" if kind == "place" else "no choice of senders is faster"
    rate = _link_rate(plan)
    if not _proves(plan, kind, takes_s):
        return f"that is this answer, nothing is faster than {seconds_text(report['bound'] / rate)}"
    return f"nothing is faster than that, this answer takes {seconds_text(report['objective'] / rate)}"


def _proves(plan: Json, kind: str, takes_s: float) -> bool:
    """Whether a time is that of the bound, and not only that of the answer."""
    return takes_s * _link_rate(plan) <= float(plan["solver"][kind]["bound"]) * BOUND_TOLERANCE + 1


def _in_port(plan: Json, kind: str, certificate: Json) -> str:
    rate, takes_s = _takes(plan, certificate)
    verb = "must receive" if _proves(plan, kind, takes_s) else "receives"
    told = f"{certificate['port']} {verb} {size_text(certificate['bytes'])} at {size_text(rate)}/s"
    return f"{told} = {seconds_text(takes_s)}: {_conclusion(plan, kind, takes_s)}"


def _storage(plan: Json, kind: str, certificate: Json) -> str:
    rate, takes_s = _takes(plan, certificate)
    told = f"{certificate['port']} must read {size_text(certificate['bytes'])} from storage at {size_text(rate)}/s"
    return f"{told} = {seconds_text(takes_s)}: {_conclusion(plan, kind, takes_s)}"


def _out_ports(plan: Json, kind: str, certificate: Json) -> str:
    holders = str(certificate["ports"]).split(",")
    rate, takes_s = _takes(plan, certificate, len(holders))
    told = f"{size_text(certificate['bytes'])} are only on {', '.join(holders)}"
    ports = f"{count_text(len(holders), 'port')} at {size_text(rate)}/s together"
    return f"{told}: {ports} need {seconds_text(takes_s)}, {_conclusion(plan, kind, takes_s)}"


def _port_prices(plan: Json, kind: str, certificate: Json) -> str:
    shares = ", ".join(f"{name} ({value:g})" for name, value in sorted(certificate.items()) if name != "kind")
    return f"these ports together bound the time by their prices: {shares or 'none'}"


def _nothing_to_copy(plan: Json, kind: str, certificate: Json) -> str:
    return "nothing has to pass between instances: nothing could be faster"


def _assignment(plan: Json, kind: str, certificate: Json) -> str:
    report, reused = plan["solver"][kind], size_text(certificate["reused_bytes"])
    most = "the most that any placement reuses"
    if report["status"] != "optimal" or report["objective"] != report["bound"]:
        most = f"no placement reuses more than {size_text(report['bound'])}"
    return f"{reused} stay where they are, {most}; {count_text(certificate['stayed'], 'GPU')} keep their position"


def _chosen(certificate: Json) -> str:
    replicas = count_text(certificate["data"], "replica")
    stages = count_text(certificate["pipeline"], "stage")
    return f"{replicas} of {stages} x {count_text(certificate['tensor'], 'GPU')}"


def _epsilon_lexicographic(plan: Json, kind: str, certificate: Json) -> str:
    measure, unit = MEASURES[certificate["measure"]]
    value = unit(plan["solver"][kind]["objective"])
    candidates = count_text(certificate["candidates"], "candidate")
    running = f"at most {certificate['max_running']} running each"
    return f"{_chosen(certificate)}, {running}: {measure} ({value}) of {candidates}{_reservations(certificate)}"


def _reservations(certificate: Json) -> str:
    """What the choice had to keep to, and what it could not have."""
    pinned = "" if certificate.get("pins", "none") == "none" else f"; pinned degrees: {certificate['pins']}"
    load = "" if certificate.get("serves_load", 1) else "; the load is more than any can serve"
    room = "; no room is kept for the next migration" if certificate.get("headroom") == "given_up" else ""
    return f"{pinned}{load}{room}"


def _template_columns(plan: Json, kind: str, certificate: Json) -> str:
    measure, unit = MEASURES[certificate["measure"]]
    value = unit(plan["solver"][kind]["objective"])
    replicas, gpus = count_text(certificate["replicas"], "replica"), count_text(certificate["gpus"], "GPU")
    # Where prices are not known the solver counts GPUs instead.
    price = f" for {usd_text(certificate['cost_micro'] / 1e6)} an hour" if plan.get("cost") else ""
    mix = f"{certificate['mix']} (tensor degree x [type:layers of each stage])"
    return f"{replicas} on {gpus}{price}: {measure} ({value}) of all mixes; {mix}{_reservations(certificate)}"


def _algorithm_1(plan: Json, kind: str, certificate: Json) -> str:
    return f"by Algorithm 1 of the paper, {MEASURES[certificate['measure']][0]}: {_chosen(certificate)}"


def _no_candidate(plan: Json, kind: str, certificate: Json) -> str:
    return "no configuration fits the memory of what is left"


def _fixed_shape(plan: Json, kind: str, certificate: Json) -> str:
    shape = f"{count_text(certificate['pipeline'], 'stage')} x {count_text(certificate['tensor'], 'GPU')}"
    return f"the policy keeps the shape {shape}: {plan['solver'][kind]['objective']:g} of it fit"


def _enumeration(plan: Json, kind: str, certificate: Json) -> str:
    return f"every configuration was tried: {MEASURES[certificate['measure']][0]}"


def _grace_ends(plan: Json, kind: str, certificate: Json) -> str:
    return f"even the last of {count_text(certificate['points'], 'stop point')} is in time"


def _too_late(plan: Json, kind: str, certificate: Json) -> str:
    size = size_text(certificate["bytes"])
    return f"decoding on to iteration {certificate['step']} would leave {size} to send: too late for the deadline"


def _due(plan: Json, kind: str, certificate: Json) -> str:
    return f"{certificate['resource']} cannot carry in time what must be copied, whatever KV is left behind"


def _all_fit(plan: Json, kind: str, certificate: Json) -> str:
    requests = count_text(certificate["requests"], "request")
    return f"the KV of all {requests} arrives before the deadline: nothing is left behind"


def _prices(plan: Json, kind: str, certificate: Json) -> str:
    short = []
    for name, value in sorted(certificate.items()):
        if name != "kind":
            resource, _, unit = name.rpartition(" ")
            short.append(f"{resource} ({seconds_text(value / 1e6)} a {'MiB' if unit == 'us/MiB' else 'piece'})")
    return f"what is short, with the prefill that more of it would save: {', '.join(short) or 'nothing'}"


def _stops_early(plan: Json, kind: str, certificate: Json) -> str:
    return f"decoding on to iteration {certificate['step']} would still be in time; the formula does not look"


_WORDS: dict[str, Callable[[Json, str, Json], str]] = {
    "in_port": _in_port,
    "storage": _storage,
    "port_prices": _port_prices,
    "template_columns": _template_columns,
    "algorithm_1": _algorithm_1,
    "assignment_by_type": _assignment,
    "out_ports": _out_ports,
    "nothing_to_copy": _nothing_to_copy,
    "assignment": _assignment,
    "epsilon_lexicographic": _epsilon_lexicographic,
    "no_candidate": _no_candidate,
    "fixed_shape": _fixed_shape,
    "enumeration": _enumeration,
    "grace_ends": _grace_ends,
    "too_late": _too_late,
    "stops_early": _stops_early,
    "due": _due,
    "all_fit": _all_fit,
    "prices": _prices,
}
