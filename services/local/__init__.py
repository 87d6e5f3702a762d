"""Everything on one machine: embedded servers, their rules, processes and the supervisor that keeps them."""
