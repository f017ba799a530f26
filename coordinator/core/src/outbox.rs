//! Where the core puts its requests. Two faces: the core pushes, the driver drains; neither can do the other's part.
//! It must not know what an effect means.

use crate::effect::Effect;

/// The effects of one or more calls, in the order in which they must be carried out: within one call every
/// [`Effect::Persist`] comes before everything that tells somebody about it.
#[derive(Debug, Default)]
pub struct Outbox {
    effects: Vec<Effect>,
}

impl Outbox {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn push(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    /// Takes everything that is in it.
    #[must_use]
    pub fn drain(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }
}
