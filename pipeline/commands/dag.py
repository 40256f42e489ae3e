"""`python -m pipeline dag`: the DAG of dvc.yaml in Mermaid, which GitHub and the documentation draw."""

from pathlib import Path

import networkx as nx
import yaml

from pipeline.runner import dvc_inside

VARIANTS = ("-own", "-variant")  # the same stage over own data, and over the variants of ImageNet
PER = {"dataset": "data set", "method": "method", "protocol": "protocol"}


def mermaid(root: Path) -> str:
    """A flow chart with a node per stage of dvc.yaml, whatever it goes over; without arrows that others imply."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    needs = dvc_inside.graph(root)
    grouped = nx.DiGraph()
    grouped.add_nodes_from(map(_stage, needs))
    grouped.add_edges_from((_stage(after), _stage(before)) for before, after in needs.edges)
    grouped.remove_edges_from(list(nx.selfloop_edges(grouped)))
    names = [name for name in stages if name in grouped]
    arrows = sorted(nx.transitive_reduction(grouped).edges, key=lambda edge: tuple(map(names.index, edge)))
    lines = ["flowchart LR"]
    for name in names:
        per = " and ".join(PER[key] for key in stages[name].get("matrix", ()))
        lines.append(f'    {name}["{name}{f"<br/>per {per}" if per else ""}"]')
    return "\n".join([*lines, *(f"    {before} --> {after}" for before, after in arrows)])


def _stage(address: str) -> str:
    """The stage that one of a matrix belongs to."""
    name = address.partition("@")[0]
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    return name
