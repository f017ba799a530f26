//! The wire format from outside: what goes out comes back, what is damaged or incomplete is refused, and what was once
//! published keeps its number.

mod descriptors;
mod pages;
mod refusals;
mod round_trips;
mod store;
mod strategies;
