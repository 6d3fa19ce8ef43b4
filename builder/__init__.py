"""Engines out: GPU table, memory ledger, cost model, parallel planner and the engine writer."""
