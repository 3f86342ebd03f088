"""Targeted dropout inside training libraries. Nothing is imported until it is asked for.

* `td_plugin.integrations.hf`: the callback for the transformers Trainer.
* `td_plugin.integrations.lightning`: the callback for Lightning.
* `td_plugin.integrations.side_by_side`: a Trainer whose evaluations report the dense model beside the pruned one.
* `td_plugin.integrations.interrupted`: the checkpoint from which an interrupted run of the Trainer goes on.
* `td_plugin.integrations.finetune`: data set and model in; metrics, pruned checkpoint, shrunk model and ONNX file out.
* `td_plugin.integrations.demo`: the whole way on scikit-learn's digits.
"""
