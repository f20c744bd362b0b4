"""flatten_parameters() of recurrent layers on the chip cuda: weights as views of one buffer, as cuDNN wants them."""

import torch

from torch_fl import _C


def flatten_parameters(layer: torch.nn.RNNBase) -> None:
    """What RNNBase.flatten_parameters does with weights on cuda, for weights on flagos; under the same conditions."""
    weights, cudnn = layer._flat_weights, torch.backends.cudnn
    if _C._chip() != "cuda" or len(weights) != len(layer._flat_weights_names):
        return
    first = weights[0]
    if first.dtype not in cudnn.CUDNN_TENSOR_DTYPES or any(w.dtype != first.dtype for w in weights):
        return
    if not (cudnn.is_available() and cudnn.enabled) or len({w.data_ptr() for w in weights}) != len(weights):
        return
    modes = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}
    with torch.flagos.device_of(first), torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            weights,
            (4 if layer.bias else 2) + (layer.proj_size > 0),
            layer.input_size,
            modes[layer.mode],
            layer.hidden_size,
            layer.proj_size,
            layer.num_layers,
            layer.batch_first,
            layer.bidirectional,
        )
