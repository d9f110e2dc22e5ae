"""Search of a vector by ask and tell: settings, optimizers, evaluation, validation and result."""
