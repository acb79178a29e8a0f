"""LightningModules and the packages that they are put together from."""
