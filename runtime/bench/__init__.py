"""`trtx bench`: make a load, drive an executor with it, and say what was measured.

workload    what is asked: random prompts or a dataset, how many, how long
load        when it is asked: all at once, at a rate, so many in flight; the loop that drives the executor
trace       what happened: times of arrivals, tokens and steps
metrics     TTFT, TPOT, ITL, throughput and, by phase, bandwidth and FLOP/s from a trace
roofline    what steps have to do, and the ceiling that they are compared with
watch       a runner that notes what steps compute
profile     what the time of a step goes to, kernel by kernel
report      everything in one value, as JSON and as tables; plot draws it, compare sets two side by side
benchmark   all of it for one engine
"""
