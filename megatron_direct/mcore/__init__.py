"""The one door to Megatron-Core: no other room imports it."""
