"""One file per verb: flags -> one call -> print."""
