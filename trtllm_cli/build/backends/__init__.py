"""Lowering: Graph -> Plan, one module per backend."""
