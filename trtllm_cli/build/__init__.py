"""Building is compiling: a checkpoint's model is traced to a Graph, rewritten by passes, lowered to a plan, written."""
