//! The tokenizers that the configuration asks for.

use std::sync::Arc;

use anyhow::Context as _;
use prometheus::Registry;

use crate::{
    indexer::config::Tokenizers,
    tokenize::{Input, Local, Tokenize, TokenizeError, Tokenized, render::Render},
};

/// Loads them; `None` when none is configured.
///
/// # Errors
///
/// The file or the URL that cannot be used, with the reason.
pub(super) fn load(
    config: &Tokenizers,
    registry: &Registry,
) -> anyhow::Result<Option<Arc<dyn Tokenize>>> {
    let local = config
        .has_local()
        .then(|| Local::load(&config.local, registry, "kv").context("tokenizers"))
        .transpose()?;
    let render = config
        .render
        .clone()
        .map(|config| Render::new(config).map_err(anyhow::Error::msg).context("tokenizers.render"))
        .transpose()?;
    Ok(match (local, render) {
        (None, None) => None,
        (Some(local), None) => Some(Arc::new(local)),
        (None, Some(render)) => Some(Arc::new(render)),
        (Some(local), Some(render)) => Some(Arc::new(LocalFirst { local, render })),
    })
}

/// Asks the engine for what this process has no tokenizer, template or picture sizes for.
#[derive(Debug)]
struct LocalFirst<L, R> {
    local: L,
    render: R,
}

#[tonic::async_trait]
impl<L: Tokenize, R: Tokenize> Tokenize for LocalFirst<L, R> {
    async fn tokenize(&self, model: &str, input: Input) -> Result<Tokenized, TokenizeError> {
        use TokenizeError::{Multimodal, NoChatTemplate, NotConfigured};
        match self.local.tokenize(model, input.clone()).await {
            Err(NotConfigured | NoChatTemplate | Multimodal) => {
                self.render.tokenize(model, input).await
            }
            answer => answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers everything alike.
    #[derive(Debug)]
    struct Says(Result<u32, TokenizeError>);

    #[tonic::async_trait]
    impl Tokenize for Says {
        async fn tokenize(&self, _: &str, _: Input) -> Result<Tokenized, TokenizeError> {
            self.0.clone().map(|id| vec![id].into())
        }
    }

    #[tokio::test]
    async fn the_engine_is_asked_for_what_cannot_be_done_here() {
        let check = async |local: Result<u32, TokenizeError>, want: Result<u32, TokenizeError>| {
            let both = LocalFirst { local: Says(local), render: Says(Ok(2)) };
            let input = Input::Text { text: "x".into(), add_special_tokens: true };
            let ids = both.tokenize("m", input).await.map(|tokenized| tokenized.ids[0]);
            assert_eq!(ids, want);
        };
        check(Ok(1), Ok(1)).await;
        for local in
            [TokenizeError::NotConfigured, TokenizeError::NoChatTemplate, TokenizeError::Multimodal]
        {
            check(Err(local), Ok(2)).await;
        }
        check(Err(TokenizeError::Busy), Err(TokenizeError::Busy)).await;
    }

    #[test]
    fn nothing_is_loaded_unless_asked_for() {
        let registry = Registry::new();
        assert!(load(&Tokenizers::default(), &registry).unwrap().is_none());
    }
}
