"""What is written for other programs, by the same road and through the same gate.

::

    targets.py   `--target` by name        base.py     what each of them is
    lora.py      stock PEFT adapters       hf.py       folders for transformers
    genai.py     onnxruntime-genai         triton.py   model repositories
    optimum.py   the layout that optimum-onnx loads
"""
