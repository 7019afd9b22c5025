"""The main job on a world small enough to watch: invent it, pretrain on it, fine-tune, compare.

world        facts, personas and cues from a seed -> documents, chat records, prompts
pretraining  world -> small Llama -> ordinary checkpoint folder
main         checkpoint folder and chat file -> the public `run`
scoring      model -> task, drift, obedience
comparison   scores -> table and figure
"""

from benchmarks.demo.main import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
