//! Errors of optimizers.

/// A saved state does not belong to this optimizer and model, or a rule of a user's own has a name
/// that could be one of ours.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// The state was saved by a rule of another family.
    #[error("optimizer state of `{path}` is of {found}, and its rule here keeps {expected}")]
    OtherRule {
        /// Path of the parameter.
        path: String,
        /// The state family of this optimizer's rule.
        expected: &'static str,
        /// The family that the saved state names.
        found: String,
    },
    /// The name of a custom rule's state form could be that of a rule of this crate, whose states it
    /// would then take for its own.
    #[error("a custom rule's family is named `owner/rule`, and this one is `{family}`")]
    Family {
        /// The name.
        family: &'static str,
    },
    /// A state without a family has a part that this rule does not keep.
    #[error("optimizer state `{name}` is another rule's: {family} keeps none of that name")]
    NotKept {
        /// Name of the state tensor or scalar; begins with the parameter's path.
        name: String,
        /// The state family of this optimizer's rule.
        family: &'static str,
    },
    /// A part of a parameter's state is absent.
    #[error("optimizer state of `{path}` is there in part: `{name}` is missing")]
    Incomplete {
        /// Path of the parameter.
        path: String,
        /// Name of the first state tensor or scalar that is missing.
        name: String,
    },
    /// A part of a parameter's state has another shape or type than the parameter needs.
    #[error("optimizer state `{name}` does not fit its parameter")]
    Unfit {
        /// Name of the state tensor or scalar, or path of the parameter.
        name: String,
    },
    /// The state names a parameter that the model does not have, or does not train.
    #[error("optimizer state `{name}` belongs to no parameter of this model")]
    Unexpected {
        /// Name of the state tensor or scalar.
        name: String,
    },
}
