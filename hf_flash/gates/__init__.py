"""Gates: what decides which neurons a token needs. Gate `all` needs no code of its own: it wants every neuron."""

from __future__ import annotations

from hf_flash.gates.certified import CertifiedGate, Sketch

__all__ = ["CertifiedGate", "Sketch"]
