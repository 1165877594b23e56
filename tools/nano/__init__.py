"""How the weights of ``model=nano`` were made: ``python -m tools.nano --help``.

Read ``world`` (the data), ``words`` (tokenizer and text encoder), ``train_vae``, ``encode``, ``train_dit``, ``export``,
and ``judge`` (what a clip shows).
"""
