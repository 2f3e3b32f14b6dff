"""The memory-augmented network of Santoro et al. 2016: a controller, a memory, and how it is addressed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metadist.models.recurrent import lstm_update

State = dict[str, Tensor]

BLANK = 1e-6
"""What every number of the memory is before an episode."""

_LENGTH = 1e-4
"""Added to the length of a vector that is divided by it, so that a blank slot's direction has a bounded slope."""


class MANN(nn.Module):
    """A recurrent network that writes what it sees to a memory and reads it by content.

    Of a sequence of inputs it puts out, for every step, the controller's state together with what was read
    from the memory in this step; a linear layer makes scores of them (Santoro et al. 2016, section 3).

    Args:
        inputs: numbers of an input.
        outputs: numbers of an output.
        controller: ``lstm`` or ``feedforward`` (which has no memory but the external one).
        controller_size: numbers of the controller's state.
        memory: ``lrua`` (least recently used access) or ``none``, which leaves the controller alone.
        slots: rows of the memory.
        width: numbers of a row.
        read_heads: reads of a step; each head writes as well.
        usage_decay: of the slots' usage from step to step, gamma.
        sharpness: factor of the cosine similarities before the softmax; 1 in the paper.

    The state is a dict of tensors with a leading dimension of B sequences; sizes in the methods' docstrings are
    H of the controller, R heads, N slots, W numbers of a slot.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        controller: str = "lstm",
        controller_size: int = 200,
        memory: str = "lrua",
        slots: int = 128,
        width: int = 40,
        read_heads: int = 4,
        usage_decay: float = 0.99,
        sharpness: float = 10.0,
    ) -> None:
        super().__init__()
        self.controller, self.size, self.heads = controller, controller_size, read_heads if memory == "lrua" else 0
        self.slots, self.width, self.usage_decay, self.sharpness = slots, width, usage_decay, sharpness
        read = self.heads * width
        rows = controller_size * (4 if controller == "lstm" else 1)
        recurrent = read + (controller_size if controller == "lstm" else 0)
        self.from_inputs = nn.Linear(inputs, rows)
        self.from_state = nn.Linear(recurrent, rows, bias=False) if recurrent else None
        self.to_heads = nn.Linear(controller_size, self.heads * (width + 1)) if self.heads else None
        self.to_outputs = nn.Linear(controller_size + read, outputs)
        if controller == "lstm":
            # To remember is the better guess while nothing is known (Jozefowicz et al. 2015).
            nn.init.ones_(self.from_inputs.bias.data[controller_size : 2 * controller_size])

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs whole sequences.

        Args:
            inputs: ``[B, steps, inputs]``.
            state: to go on from; None is the blank one.

        Returns:
            Outputs ``[B, steps, outputs]``, and the state after the last step.
        """
        # All steps' inputs in one product: only what depends on the step before stays in the loop.
        projected = self.from_inputs(inputs).unbind(1)
        state = self.blank(inputs) if state is None else state
        steps = []
        for p in projected:
            state = self.step(p, state)
            steps.append(torch.cat([state["hidden"], state["read"]], -1) if self.heads else state["hidden"])
        return self.to_outputs(torch.stack(steps, 1)), state

    def blank(self, like: Tensor) -> State:
        """The state before the first step, for as many sequences as ``like`` has rows."""
        b = len(like)
        state = {"hidden": like.new_zeros(b, self.size)}
        if self.controller == "lstm":
            state["cell"] = like.new_zeros(b, self.size)
        if self.heads:
            state["read"] = like.new_zeros(b, self.heads * self.width)
            state["memory"] = like.new_full((b, self.slots, self.width), BLANK)
            state["read_weights"] = like.new_zeros(b, self.heads, self.slots)
            state["usage"] = like.new_zeros(b, self.slots)
        return state

    def step(self, projected: Tensor, state: State) -> State:
        """One step: the controller, then read, then write.

        Args:
            projected: the inputs' part of the controller's sum, ``[B, 4 H]`` (``[B, H]`` if feedforward).
            state: after the step before.
        """
        new = self._control(projected, state)
        return {**new, **self._access(new["hidden"], state)} if self.to_heads is not None else new

    def _control(self, projected: Tensor, state: State) -> State:
        """The controller's next state; it sees what was read in the step before (section 3.1)."""
        names = (["hidden"] if self.controller == "lstm" else []) + (["read"] if self.heads else [])
        if self.from_state is not None:
            projected = projected + self.from_state(torch.cat([state[n] for n in names], -1))
        if self.controller == "feedforward":
            return {"hidden": torch.tanh(projected)}
        hidden, cell = lstm_update(projected, state["cell"])
        return {"hidden": hidden, "cell": cell}

    def _access(self, hidden: Tensor, state: State) -> State:
        """Reads from the memory, then writes to it (section 3, equations 2 to 8).

        What is read is what the steps before have left there. The paper's notation admits the other order as well,
        but read after the write, a key finds what it has just written first of all, and learning takes far longer.
        """
        assert self.to_heads is not None
        keys, gates = self.to_heads(hidden).split([self.heads * self.width, self.heads], -1)
        keys = torch.tanh(keys).reshape(-1, self.heads, self.width)  # [B, R, W]
        gate = torch.sigmoid(gates)[..., None]  # [B, R, 1]
        read_weights = self.address(keys, state["memory"])
        least_used, erased = self.least_used(state["usage"])
        write_weights = gate * state["read_weights"] + (1 - gate) * least_used[:, None]  # equation 6
        kept = state["memory"] * (1 - erased)[..., None]
        memory = torch.baddbmm(kept, write_weights.transpose(1, 2), keys)  # equation 7
        # No slope goes through usage, which decides by its order alone.
        used = (read_weights.detach() + write_weights.detach()).sum(1)
        return {
            "memory": memory,
            "read_weights": read_weights,
            "read": torch.bmm(read_weights, state["memory"]).flatten(1),  # equation 4
            "usage": self.usage_decay * state["usage"] + used,  # equation 5
        }

    def address(self, keys: Tensor, memory: Tensor) -> Tensor:
        """Read weights ``[B, R, N]``: the softmax of the keys' cosines with the slots (equations 2 and 3)."""
        # The slots' lengths divide the few products rather than the many numbers of the memory.
        keys = keys * _inverse_length(keys)[..., None]
        cosines = torch.bmm(keys, memory.transpose(1, 2)) * _inverse_length(memory)[:, None]
        return torch.softmax(self.sharpness * cosines, -1)

    def least_used(self, usage: Tensor) -> tuple[Tensor, Tensor]:
        """The R least used slots, and the one to erase.

        Of slots used equally the first come first; equation 5's threshold would take all of them.

        Args:
            usage: ``[B, N]``.

        Returns:
            Two tensors ``[B, N]`` of 0 and 1: the R slots of least usage, and the least used of all.
        """
        order = usage.sort(dim=-1, stable=True).indices
        nothing = torch.zeros_like(usage)
        one = torch.ones_like(usage[:, : self.heads])
        return nothing.scatter(-1, order[:, : self.heads], one), nothing.scatter(-1, order[:, :1], one[:, :1])


def _inverse_length(vectors: Tensor) -> Tensor:
    """One over the length of each vector of ``[..., W]``, bounded for blank ones."""
    return 1 / (torch.linalg.vector_norm(vectors, dim=-1) + _LENGTH)
