//! The one source of chance of a run: small, seeded, and the same on every machine. It must not know what is drawn.

/// xorshift64*, seeded through splitmix so that neighbouring seeds have nothing in common.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut state = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((state ^ (state >> 31)) | 1)
    }

    /// A generator of its own for one purpose, so that more draws for one thing do not change all others.
    pub(crate) fn fork(&mut self) -> Self {
        Self::new(self.next())
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number from `least` to `most`.
    pub(crate) fn between(&mut self, least: u64, most: u64) -> u64 {
        least + (self.next() >> 16) % (most.saturating_sub(least) + 1)
    }

    /// True in so many cases of a hundred.
    pub(crate) fn percent(&mut self, share: u64) -> bool {
        self.between(0, 99) < share
    }

    /// One of several, by weight.
    pub(crate) fn weighted<T: Copy>(&mut self, of: &[(u64, T)]) -> T {
        let total: u64 = of.iter().map(|(weight, _)| weight).sum();
        let mut drawn = self.between(1, total.max(1));
        for (weight, value) in of {
            if drawn <= *weight {
                return *value;
            }
            drawn -= weight;
        }
        unreachable!("the weights add up to what was drawn from")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_it_all_and_neighbours_differ() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            let mut own = rng.fork();
            [
                rng.between(0, u64::MAX - 1),
                own.between(1, 6),
                rng.weighted(&[(1, 7), (9, 8)]),
            ]
        };
        assert_eq!(draw(5), draw(5));
        assert_ne!(draw(5)[0], draw(6)[0]);
    }

    #[test]
    fn weights_are_kept_and_bounds_are_met() {
        let mut rng = Rng::new(1);
        let often = (0..1000)
            .filter(|_| rng.weighted(&[(1, false), (9, true)]))
            .count();
        assert!((850..950).contains(&often), "{often}");
        assert!((0..1000).all(|_| (3..=5).contains(&rng.between(3, 5))));
    }
}
