"""Engines at work: the decoder, op sets, KV blocks, scheduler, sampler, executor, `LLM` and the benchmark."""
