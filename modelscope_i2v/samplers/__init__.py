"""Samplers as functions of a denoiser. They know nothing of networks, prompts or ModelScope.

A *velocity* is a function ``velocity(x, t) -> v`` of a variance-preserving state x [B, C, F, h, w] and an
integer timestep; guidance and temporal windows wrap one. A *denoiser* is a function of a state and a noise
level that predicts the clean x0; samplers call one, and a callback ``(step, timestep, x)`` after each step.
"""
