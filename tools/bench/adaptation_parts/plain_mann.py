"""A memory-augmented network the obvious way: ``torch.nn.LSTMCell`` and one memory access after the other.

The mathematics is that of :mod:`metadist.models.mann` (Santoro et al. 2016, section 3), whose weights it takes over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench.adaptation_parts.workloads import Call, Job, Tensors

SLOTS, WIDTH, HEADS, SIZE = 128, 40, 4, 200
BLANK, LENGTH, DECAY, SHARPNESS = 1e-6, 1e-4, 0.99, 10.0


class PlainMANN(nn.Module):
    """Reads sequences ``[B, steps, inputs]`` and puts out ``[B, steps, outputs]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(inputs + HEADS * WIDTH, SIZE)
        self.keys, self.gates = nn.Linear(SIZE, HEADS * WIDTH), nn.Linear(SIZE, HEADS)
        self.answer = nn.Linear(SIZE + HEADS * WIDTH, outputs)

    def forward(self, sequences: Tensor) -> Tensor:
        b = len(sequences)
        hidden = cell = sequences.new_zeros(b, SIZE)
        read = sequences.new_zeros(b, HEADS * WIDTH)
        memory = sequences.new_full((b, SLOTS, WIDTH), BLANK)
        weights, usage = sequences.new_zeros(b, HEADS, SLOTS), sequences.new_zeros(b, SLOTS)
        outputs = []
        for t in range(sequences.shape[1]):
            hidden, cell = self.cell(torch.cat([sequences[:, t], read], -1), (hidden, cell))
            read, memory, weights, usage = self.access(hidden, memory, weights, usage)
            outputs.append(self.answer(torch.cat([hidden, read], -1)))
        return torch.stack(outputs, 1)

    def access(
        self, hidden: Tensor, memory: Tensor, weights: Tensor, usage: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One read and one write: what was read, and the memory, read weights and usage after it."""
        keys = torch.tanh(self.keys(hidden)).view(-1, HEADS, WIDTH)
        gate = torch.sigmoid(self.gates(hidden)).unsqueeze(-1)
        lengths = (keys.norm(dim=-1, keepdim=True) + LENGTH) * (memory.norm(dim=-1).unsqueeze(1) + LENGTH)
        new_weights = torch.softmax(SHARPNESS * (keys @ memory.transpose(1, 2)) / lengths, -1)
        order = usage.sort(dim=-1, stable=True).indices
        least = F.one_hot(order[:, :HEADS], SLOTS).sum(1).to(usage.dtype)
        erased = F.one_hot(order[:, 0], SLOTS).to(usage.dtype)
        write = gate * weights + (1 - gate) * least.unsqueeze(1)
        read = (new_weights @ memory).flatten(1)
        memory = memory * (1 - erased).unsqueeze(-1) + write.transpose(1, 2) @ keys
        usage = DECAY * usage + (new_weights + write).sum(1).detach()
        return read, memory, new_weights, usage


def _gates_in_torchs_order(rows: Tensor) -> Tensor:
    """Input, forget, output, candidate to input, forget, candidate, output; and back."""
    i, f, o, g = rows.chunk(4)
    return torch.cat([i, f, g, o])


def _take_over(module: PlainMANN, params: Tensors) -> None:
    from_inputs, from_state = params["core.from_inputs.weight"], params["core.from_state.weight"]
    heads, bias = params["core.to_heads.weight"], params["core.to_heads.bias"]
    split = HEADS * WIDTH
    module.load_state_dict({
        "cell.weight_ih": _gates_in_torchs_order(torch.cat([from_inputs, from_state[:, SIZE:]], 1)),
        "cell.weight_hh": _gates_in_torchs_order(from_state[:, :SIZE]),
        "cell.bias_ih": _gates_in_torchs_order(params["core.from_inputs.bias"]),
        "cell.bias_hh": torch.zeros_like(params["core.from_inputs.bias"]),
        "keys.weight": heads[:split], "keys.bias": bias[:split],
        "gates.weight": heads[split:], "gates.bias": bias[split:],
        "answer.weight": params["core.to_outputs.weight"], "answer.bias": params["core.to_outputs.bias"],
    })  # fmt: skip


def _by_our_names(module: PlainMANN) -> Tensors:
    grads = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    inputs = module.cell.input_size - HEADS * WIDTH
    of_inputs, of_hidden = (_gates_in_torchs_order(grads[f"cell.weight_{k}"]) for k in ("ih", "hh"))
    return {
        "core.from_inputs.weight": of_inputs[:, :inputs],
        "core.from_inputs.bias": _gates_in_torchs_order(grads["cell.bias_ih"]),
        "core.from_state.weight": torch.cat([of_hidden, of_inputs[:, inputs:]], 1),
        "core.to_heads.weight": torch.cat([grads["keys.weight"], grads["gates.weight"]]),
        "core.to_heads.bias": torch.cat([grads["keys.bias"], grads["gates.bias"]]),
        "core.to_outputs.weight": grads["answer.weight"],
        "core.to_outputs.bias": grads["answer.bias"],
    }


def plain_mann(job: Job) -> Call:
    """All sequences at once, step by step."""
    ways = job.workload.ways
    support_x, support_y, query_x, query_y = job.stacked()
    module = PlainMANN(support_x[0, 0].numel() + ways, ways).to(job.device, job.dtype)
    _take_over(module, job.params)

    def call() -> Tensors:
        module.zero_grad(set_to_none=True)
        x, y = torch.cat([support_x, query_x], 1).flatten(2), torch.cat([support_y, query_y], 1)
        labels = F.one_hot(y, ways).to(x.dtype)
        told = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
        outputs = module(torch.cat([x, told], -1))
        # The mean over a sequence, summed over sequences.
        loss = F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        loss.backward()
        return _by_our_names(module)

    return call
