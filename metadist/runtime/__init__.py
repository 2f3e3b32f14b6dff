"""Where the parts live and who decides: a pure ledger of leases, a controller, and two backends."""
