"""A policy behind the field's network protocols: `paligemma-vla serve`."""
