"""Everything that travels to the Hub as a captioner's code; these modules import nothing but each other."""
