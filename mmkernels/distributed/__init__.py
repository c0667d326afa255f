"""What passes between the ranks of a loss, and in what order; no formula of a loss is known here."""
