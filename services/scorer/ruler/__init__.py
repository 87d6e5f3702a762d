"""The ruler judge: a language model ranks a group in hindsight; what it is shown, the ledger of what it was asked."""
