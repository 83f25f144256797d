"""The workflow that a run was queued with, which ComfyUI writes into the pictures that the run saves."""


def remember(hidden, properties: dict) -> None:
    """Put properties onto this node in the workflow of the run, so that its pictures carry them.

    hidden: of the node's class, with unique_id and extra_pnginfo. Does nothing where the run came without a workflow
    (scripts send none), and within subgraphs, whose definition several nodes may share.
    """
    extra = hidden.extra_pnginfo
    workflow = extra.get("workflow") if isinstance(extra, dict) else None
    nodes = workflow.get("nodes") if isinstance(workflow, dict) else None
    for node in nodes if isinstance(nodes, list) else ():
        if isinstance(node, dict) and str(node.get("id")) == str(hidden.unique_id):
            kept = node.get("properties")
            node["properties"] = {**(kept if isinstance(kept, dict) else {}), **properties}
