"""Samplers as functions of a denoiser. They know nothing of networks, prompts or ModelScope.

A *denoiser* ``denoise(x, level) -> x0`` predicts the clean latent from a variance-preserving
x = alpha x0 + sigma n, all [B, C, F, h, w]. A sampler takes one, a state, descending noise levels and a
callback ``(step, timestep or s, x)`` that it calls after each step. A *velocity* ``velocity(x, level) -> v``
predicts v = alpha n - sigma x0: guidance and temporal windows wrap one, and ``denoiser`` makes it a denoiser.
"""
