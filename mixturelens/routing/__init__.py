"""What the evidence says about the router: the verdict, the routing circuit, and the repair of transfer."""
