"""HOW models are made: from a spec to a registered, evaluated, quantised model."""
